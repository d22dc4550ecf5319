"""What the state machine is made of: the steps that it takes, and a session of the service beside the reference model."""
