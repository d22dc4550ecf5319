-- The deployment before revision 076, as a team made it by hand.
CREATE TABLE device_state (
  tenant_id            TEXT NOT NULL,
  site_id              TEXT NOT NULL,
  device_id            TEXT NOT NULL,
  status               TEXT NOT NULL DEFAULT 'OFFLINE',
  last_heartbeat_at    TIMESTAMPTZ,
  last_telemetry_at    TIMESTAMPTZ,
  last_seen_at         TIMESTAMPTZ,
  last_state_change_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  state                JSONB NOT NULL DEFAULT '{}',
  PRIMARY KEY (tenant_id, device_id)
);
CREATE INDEX idx_device_state_site ON device_state (tenant_id, site_id);
CREATE INDEX idx_device_state_status ON device_state (tenant_id, status);
