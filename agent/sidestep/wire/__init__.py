"""What goes over wires, as pure functions: bytes in, values out. Nothing here does I/O."""
