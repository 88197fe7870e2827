"""The command line for people: asks the agents and the control plane, owns nothing."""
