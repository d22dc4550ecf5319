"""`python -m iot_models`: the same as the script `iot-models`."""

import sys

from iot_models.cli import main

if __name__ == "__main__":
    sys.exit(main())
