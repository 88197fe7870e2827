"""The node agent: which pods are enrolled, their certificates, the BPF programs in them, and what the engine must know."""
