"""A source of one's own: PNG files RAW_DIR/SPLIT/LABEL/SLIDE_NUMBER.png, as train/1/a7_003.png."""

from pathlib import Path

import numpy as np
from PIL import Image

import histo_jax


@histo_jax.register_source("png_folders")
class PngFolders:
    def __init__(self, data):
        self.folder = Path(data.raw_dir)

    def splits(self):
        return {folder.name: self.read(folder) for folder in sorted(self.folder.iterdir())}

    def read(self, folder):
        for path in sorted(folder.glob("[01]/*.png")):
            image, slide = np.asarray(Image.open(path)), path.stem.rpartition("_")[0]
            yield histo_jax.Example(path.stem, image, int(path.parent.name), slide)


def get_config():
    config = histo_jax.Config()
    config.data.source = "png_folders"
    return config
