"""The version of the code, which records, statements and sites' settings compare."""

VERSION = "0.2.0"
