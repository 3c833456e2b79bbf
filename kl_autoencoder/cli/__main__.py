"""python -m kl_autoencoder.cli: what several processes are launched as."""

import sys

from .main import main

sys.exit(main())
