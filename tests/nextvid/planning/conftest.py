"""The autoencoders of the encoding tests."""

from tests.nextvid.encode.conftest import cosine_autoencoder as cosine_autoencoder
from tests.nextvid.encode.conftest import random_autoencoder as random_autoencoder
