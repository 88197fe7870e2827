"""The engine's process: a thin host around the C engine (tunnel/), told what to do over a Unix socket."""
