"""The version of this package: `config.json` records it, and older runs are refused by it."""

VERSION = "0.2.0"
