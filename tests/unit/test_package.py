"""The package itself: what is installed is what the checkout holds."""

import importlib.metadata

import largefs


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("largefs") == largefs.__version__
