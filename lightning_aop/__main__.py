"""`python -m lightning_aop` is the `lightning-aop` command."""

import sys

from lightning_aop.cli.main import main

sys.exit(main())
