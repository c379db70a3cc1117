import errno
import os

import pytest

from histo_jax.errors import UserError
from histo_jax.run import files


def raised_inside(folder, error):
    with pytest.raises(type(error) if isinstance(error, UserError) else OSError) as caught:  # noqa: SIM117
        with files.disk_errors(folder):
            raise error
    return caught.value


def test_a_librarys_error_of_the_disk_names_the_folder_or_the_other_file(tmp_path):
    for number in (errno.ENOSPC, errno.EACCES, errno.EIO):
        message = os.strerror(number)
        inside = f'Error opening "{tmp_path}/run/0/d": {message}'
        for words, place in (
            (f"write failed: {message}", tmp_path),
            (inside, tmp_path),
            (f"Error opening '/dev/shm/part': {message}", "/dev/shm/part"),
        ):
            error = raised_inside(tmp_path, ValueError(words))
            assert (error.errno, error.filename) == (number, str(place))


def test_an_error_that_names_its_file_is_left_as_it_is(tmp_path):
    denied = UserError("x.tif cannot be read (Permission denied)")
    busy = OSError(errno.EBUSY, "busy", "/raw/x.tif")
    assert raised_inside(tmp_path, denied) is denied
    assert raised_inside(tmp_path, busy) is busy
