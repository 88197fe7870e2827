"""The node agent: which pods are enrolled, their certificates, their BPF programs, what the engine must know."""
