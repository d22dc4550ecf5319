"""Both ends of a message bus: reports in by the batch, desired documents out without missing one.

    ReportBuffer    gathers the reports of many messages and writes them in one transaction for each tenant
    watch_pending   gives each device that has something to acknowledge, now and whenever there is something new

Nothing here knows a broker: `examples/mqtt_bridge.py` is one end of MQTT. docs/bus.md says who sends what, and when.
"""

from iot_models.bus.pending import watch_pending
from iot_models.bus.report_buffer import ReportBuffer

__all__ = ["ReportBuffer", "watch_pending"]
