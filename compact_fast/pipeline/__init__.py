"""From a configuration to a trained, evaluated student: what the commands have in common."""
