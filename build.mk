# What `make build` and `make check` do, part by part. Called by the Makefile; every part adds its own rules here.
# Parts: protobuf modules (agent/sidestep/wire), BPF objects (bpf), C programs (cni, tunnel/supervise), the cffi extensions and the package.

.PHONY: all check
BIN := agent/sidestep/bin

all:
	@$(PY) -c 'import sidestep' 2>/dev/null || .venv/bin/pip install -q --disable-pip-version-check --no-build-isolation -e '.[lab]'

check: all
