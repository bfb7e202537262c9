"""Tests; a package, so that helpers are imported as `tests.<module>` and this directory stays off the import path."""
