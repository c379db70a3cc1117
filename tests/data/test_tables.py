"""CSV files as spreadsheets, pandas and notebooks write them."""

import codecs
import errno
import os
import re

import pytest

from histo_jax.data.tables import read_csv
from histo_jax.errors import UserError

PLAIN = "id,wsi\na,s1\nb,s 2\n"
SAME = {
    "plain": PLAIN,
    "windows": PLAIN.replace("\n", "\r\n"),
    "old-mac": PLAIN.replace("\n", "\r"),
    "byte-order-mark": "\ufeff" + PLAIN,
    "two-byte-order-marks": "\ufeff\ufeff" + PLAIN,
    "utf-16": PLAIN.encode("utf-16"),
    "utf-16-big": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "quotes": '"id","wsi"\n"a","s1"\n"b","s 2"\n',
    "spaces": " id , wsi\n a ,\u00a0s1\u200b\nb\t,s 2  \n",
    "capitals": PLAIN.replace("id,wsi", "ID,Wsi"),
    "other-order": "wsi,id\ns1,a\ns 2,b\n",
    "index-and-more": ',x,id,,wsi\n0,"1,5",a,,s1\n1,,b,,s 2\n',
    "outlines": f"id,outline,wsi\na,{'x' * 200_000},s1\nb,,s 2\n",
    "empty-lines": "\n\nid,wsi\na,s1\n\n , \nb,s 2\n\n,\n",
    "commas-at-ends": PLAIN.replace("\n", ",\n"),
    "cells-beyond-empty": PLAIN.replace("s1", "s1,, "),
    "no-end": PLAIN[:-1],
}


@pytest.mark.parametrize("name", SAME)
def test_forms_of_one_table(tmp_path, name):
    text = SAME[name]
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = read_csv(path, ("id", "wsi"))
    assert table.to_dict("list") == {"id": ["a", "b"], "wsi": ["s1", "s 2"]}


def test_rows_are_indexed_by_their_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('id,wsi\n\n"two\nlines",s\n\nb,s\n')
    assert read_csv(path, ("id",)).index.tolist() == [3, 6]


BAD = {
    "latin-1": ("é,s".encode("latin-1"), "utf-8.*0xe9.*save it as UTF-8"),
    "utf-16-without-byte-order-mark": (PLAIN.encode("utf-16-le"), "save it as UTF-8"),
    "utf-16-cut": (PLAIN.encode("utf-16")[:-1], "utf-16.*save it as UTF-8"),
    "empty": (b" \n\n", "it is empty"),
    "other-columns": (b"name,slide\n", "columns id,wsi .*'name,slide'; correct the header"),
    "column-twice": (b"id,wsi,id\n", "header must name the columns id,wsi"),
    "long-row": (b"id,wsi\na,s,t\n", "line 2 is longer than the header"),
    "tab-after-quote": (b'"id"x\twsi\n', "line 1: .* expected after"),
    "open-quote": (b'id,wsi\na,"s\n', "not a readable CSV"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_table(tmp_path, name):
    content, words = BAD[name]
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{words}") as error:
        read_csv(path, ("id", "wsi"))
    assert str(error.value).isprintable()


def test_errors_of_the_system_keep_their_words(tmp_path):
    for path, number in ((tmp_path, errno.EISDIR), (tmp_path / "none.csv", errno.ENOENT)):
        with pytest.raises(UserError, match="cannot be read") as error:
            read_csv(path, ("id",))
        assert f"{path} cannot be read ({os.strerror(number)}): " in str(error.value)
