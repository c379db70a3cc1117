"""Where patches come from: one file per built-in source, registered as a user's own are.

A source is a class. `histo_jax.register_source` describes its constructor, `splits()` and
`fingerprint()`. It may also have these attributes and methods:

- `image_size`: class attribute, height and width of its patches in pixels, if these are fixed.
- `classes`: class attribute, the names of label 0 and label 1 in reports, maps and exports, such as
  `("no tumour", "tumour")`; by default `("negative", "positive")`.
- `label_region`, `mpp`: class attributes, see `histo_jax.data.example.PatchSpec`.
- `modified() -> str | None`: hash of the modification times of files that the fingerprint covers
  in part only. A change is logged.
- `origin`: text that names the data in the log, where `data.raw_dir` does not.
- `scratch`: set before `splits()` is called, to a folder on the disk of the records, which is
  removed in the end.
- `corrupt`: dict of the files that were left out, and why, once all examples were read.
- `intact(corrupt) -> list[str]`: those of the files that can be read by now; `corrupt` maps each to
  the reason.
- `recognizes(raw_dir) -> bool`: class method; whether a folder looks like this source's.
"""
