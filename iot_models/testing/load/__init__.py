"""Load for a database of yours: `python -m iot_models.testing.load` says what it takes, and what limits it.

    plan          what is asked for: how many devices, which rate
    fleet         the devices, in tenants of their own: made before, deleted afterwards
    traffic       reports and desired writes, each begun when it is due
    meters        what is measured in this process: latencies, the pool, the event loop
    observation   what is asked of the server: what our sessions wait for, WAL, HOT updates
    verdict       what all of it means: whether the rate was reached, and the bottleneck if not
    output        progress, and the result for people and for programs
    run           how a run goes
    command_line  its options

Nothing here is to be imported by applications.
"""
