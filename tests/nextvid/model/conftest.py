"""Shapes and dtypes of every public tensor signature are checked while these tests run."""

from jaxtyping import install_import_hook

install_import_hook("nextvid.model", "beartype.beartype")
