#!/bin/sh
# Both histories on the database at DATABASE_URL. Ours comes first on the way up, and last on the way down.
set -eux
python -m iot_models.migrate upgrade head
python -m alembic upgrade head
python -m iot_models.migrate check
python -m alembic check
python -m alembic downgrade -1
python -m iot_models.migrate downgrade 075
python -m iot_models.migrate upgrade head
python -m alembic upgrade head
