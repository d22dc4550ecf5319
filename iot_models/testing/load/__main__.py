"""`python -m iot_models.testing.load`."""

import sys

from iot_models.testing.load.command_line import main

if __name__ == "__main__":
    sys.exit(main())
