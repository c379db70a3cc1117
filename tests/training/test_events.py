"""TensorBoard's events agree with the history after any kill."""

import multiprocessing

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from histo_jax.training.events import CURVES, EventWriter, TensorBoard, repair

NAMES = ("train_loss", "gradient_norm")
ROWS = [{"step": 3 * k, "train_loss": 1 / k, "gradient_norm": float(k)} for k in (1, 2)]


def points(folder):
    """The events of each file alone: TensorBoard itself hides some duplicates."""
    events_found = []
    for path in folder.glob("*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            events_found += [(tag, e.step, round(e.value, 4)) for e in events.Scalars(tag)]
        for tag in events.Tags()["images"]:
            events_found += [
                (tag, e.step, len(e.encoded_image_string) > 50) for e in events.Images(tag)
            ]
    return sorted(events_found)


def write(folder, rows):
    writer = EventWriter(folder)
    if not list(folder.glob("*")):
        writer.add_image("sheet", np.zeros((8, 8, 3), np.uint8), 0)
    for row in rows:
        writer.add_scalars({name: row[name] for name in NAMES}, row["step"])
    writer.close()


def all_points(rows=ROWS):
    scalars = [(name, row["step"], round(row[name], 4)) for row in rows for name in NAMES]
    return sorted([("sheet", 0, True), *scalars])


def cut(folder):
    (path,) = folder.glob("*")
    path.write_bytes(path.read_bytes()[:-7])


def fill_with_zeros(folder):
    (path,) = folder.glob("*")
    path.write_bytes(path.read_bytes()[:-30] + bytes(30))


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: None,
        cut,
        fill_with_zeros,
        lambda folder: write(folder, [{"step": 9, "train_loss": 0.1, "gradient_norm": 0.1}]),
        lambda folder: write(folder, ROWS[:1]),
        lambda folder: (folder / "events.out.tfevents.9.empty").touch(),
    ],
    ids=["whole", "cut", "zeros", "later", "twice", "empty"],
)
@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_files_agree_with_the_history_after_any_kill(tmp_path, harm, epochs):
    folder = tmp_path / "events"
    write(folder, ROWS[:epochs])
    harm(folder)
    for _ in range(2):
        repair(folder, ROWS, NAMES, ROWS[-1]["step"])
        sheet = [] if harm in (cut, fill_with_zeros) and not epochs else [("sheet", 0, True)]
        assert points(folder) == sorted(set(all_points()) - {("sheet", 0, True)} | set(sheet))
    before = {path: path.read_bytes() for path in folder.glob("*")}
    repair(folder, ROWS, NAMES, ROWS[-1]["step"])
    assert {path: path.read_bytes() for path in folder.glob("*")} == before


def test_events_after_the_checkpoint_are_dropped_and_old_histories_have_fewer_names(tmp_path):
    folder = tmp_path / "events"
    repair(folder, [], NAMES, 0)
    assert not folder.exists()
    write(folder, ROWS)
    repair(folder, [{"step": 3, "train_loss": 1.0}], NAMES, 3)
    assert points(folder) == all_points(ROWS[:1])


def test_neither_shared_memory_nor_the_second_of_the_start_matter(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Queue", missing)
    for row in ROWS:  # two starts within a second
        write(tmp_path, [row])
    assert points(tmp_path) == all_points()


def test_an_image_that_a_killed_process_wrote_is_not_written_again(tmp_path):
    folder, image = tmp_path / "events", np.zeros((8, 8, 3), np.uint8)
    for restored in ([], [dict.fromkeys(CURVES, 1.0) | {"step": 3}]):
        with TensorBoard(folder) as tensorboard:
            tensorboard.restore(restored, 3)
            tensorboard.on_images("sheet", 0, image)
    names = [name for name, _, _ in points(folder)]
    assert sorted(names) == sorted(["sheet", *CURVES])
