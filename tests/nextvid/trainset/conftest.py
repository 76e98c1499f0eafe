"""The small labelled corpus of the curation tests."""

from tests.nextvid.corpus.conftest import own_copy as own_copy
from tests.nextvid.corpus.conftest import small_corpus as small_corpus
from tests.nextvid.corpus.conftest import small_files as small_files
