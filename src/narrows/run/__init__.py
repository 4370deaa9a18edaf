"""Running a training plan for real: ranks on this machine, what they send, the step that a layout means, and checkpoints."""
