"""`python -m kl_autoencoder` is the command `kl-autoencoder`."""

import sys

from .cli import main

sys.exit(main())
