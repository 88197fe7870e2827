# What `make build` and `make check` do, part by part. Called by the Makefile; every part adds its own rules here.
# Parts: protobuf modules (agent/sidestep/wire), BPF objects (bpf), C programs (cni, tunnel/supervise), the cffi extensions and the package.

.PHONY: all check
BIN := agent/sidestep/bin

all:
	@$(PY) -c 'import sidestep' 2>/dev/null || .venv/bin/pip install -q --disable-pip-version-check --no-build-isolation -e '.[lab]'

check: all

# The CNI plugin, and the lab's container runner: static C programs.
all: $(BIN)/sidestep-cni $(BIN)/podrun

$(BIN)/sidestep-cni: cni/sidestep-cni.c
	@mkdir -p $(BIN)
	gcc $(CFLAGS_C) -static -o $@.new $< && mv $@.new $@

$(BIN)/podrun: agent/sidestep/lab/podrun.c
	@mkdir -p $(BIN)
	gcc $(CFLAGS_C) -static -o $@.new $< && mv $@.new $@

.PHONY: fuzz-cni
check: fuzz-cni
fuzz-cni: all
	@mkdir -p $(OUT)
	@$(CLANG) $(CFLAGS_C) -DSIDESTEP_FUZZ -fsanitize=fuzzer,address,undefined -o $(OUT)/fuzz-cni cni/sidestep-cni.c
	@$(OUT)/fuzz-cni -max_total_time=$(FUZZ) >$(OUT)/fuzz-cni.log 2>&1 || { tail -n 40 $(OUT)/fuzz-cni.log; exit 1; }
