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
	@$(OUT)/fuzz-cni -max_total_time=$(FUZZ) -artifact_prefix=$(OUT)/ >$(OUT)/fuzz-cni.log 2>&1 || { tail -n 40 $(OUT)/fuzz-cni.log; exit 1; }

# Protobuf modules, and their stubs, from agent/sidestep/wire/*.proto. No .proto imports another of ours.
WIRE := agent/sidestep/wire
PROTOS := $(wildcard $(WIRE)/*.proto)
all: $(WIRE)/pb/.made

$(WIRE)/pb/.made: $(PROTOS)
	@rm -rf $(WIRE)/pb.new && mkdir -p $(WIRE)/pb.new $(WIRE)/pb
	$(PY) -W ignore -m grpc_tools.protoc -I $(WIRE) --python_out=$(WIRE)/pb.new --pyi_out=$(WIRE)/pb.new $(PROTOS)
	@echo '"""Generated from the .proto files one directory up, by build.mk."""' >$(WIRE)/pb.new/__init__.py
	@mv -f $(WIRE)/pb.new/*.py $(WIRE)/pb.new/*.pyi $(WIRE)/pb/ && rmdir $(WIRE)/pb.new && touch $@

# The engine's supervisor, pid 1 of its container: static too.
all: $(BIN)/supervise

$(BIN)/supervise: tunnel/supervise.c
	@mkdir -p $(BIN)
	gcc $(CFLAGS_C) -static -o $@.new $< && mv $@.new $@

# The programs of the pods' namespaces: compiled, stripped of DWARF (BTF stays), embedded into sidestep._bpf as skeletons.
BPF_SKEL := $(OUT)/bpf/capture.skel.h $(OUT)/bpf/survey.skel.h $(OUT)/bpf/kubelet.skel.h $(OUT)/bpf/flows.skel.h
BPFTOOL  := $(firstword $(wildcard /usr/sbin/bpftool /sbin/bpftool) bpftool)

$(OUT)/bpf/%.skel.h: bpf/%.bpf.c bpf/maps.h bpf/shared.h bpf/kernel.h
	@mkdir -p $(@D)
	@echo "build: bpf/$*.bpf.c"
	@$(CLANG) -O2 -g -target bpf -mcpu=v2 -Wall -Werror -I/usr/include/$(shell uname -m)-linux-gnu -c $< -o $(OUT)/bpf/$*.o
	@llvm-strip-16 -g $(OUT)/bpf/$*.o
	@$(BPFTOOL) gen skeleton $(OUT)/bpf/$*.o name $*_bpf >$@.new && mv $@.new $@

# The cffi extensions sidestep._bpf and sidestep._tunnel. Built aside and moved in place: a running engine has the old one mapped.
EXT_SRC := setup.py $(wildcard bpf/build_ffi.py tunnel/build_ffi.py bpf/*.[ch] tunnel/*.[ch])

all: $(OUT)/.ext
$(OUT)/.ext: $(EXT_SRC) $(BPF_SKEL)
	@mkdir -p $(OUT)
	@echo "build: the cffi extensions"
	@flock $(OUT)/.ext-lock sh -c '$(PY) setup.py -q build_ext --build-temp $(OUT)/ext-obj --build-lib $(OUT)/ext && \
	  for so in $(OUT)/ext/sidestep/*.so; do cp $$so agent/sidestep/.new.so && mv agent/sidestep/.new.so agent/sidestep/$$(basename $$so) || exit 1; done'
	@touch $@

# The engine under ASan and UBSan: every tests/tunnel/t_*.c is a program with main() (cmocka), every tests/tunnel/fuzz/*.c a libFuzzer
# target; both are linked with all of tunnel/ (but supervise.c). A target's seeds may lie in tests/tunnel/fuzz/NAME/.
SAN      := -g -O1 -fPIC -std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror -fno-omit-frame-pointer -fno-sanitize-recover=all -Itunnel -Ibpf
SAN_OBJ  := $(patsubst tunnel/%.c,$(OUT)/san/%.o,$(filter-out tunnel/supervise.c,$(wildcard tunnel/*.c)))
SAN_HDR  := $(wildcard tunnel/*.h bpf/*.h tests/tunnel/*.h)
SAN_LIBS := -lssl -lcrypto -lnghttp2 -lpthread
C_TESTS  := $(patsubst tests/tunnel/%.c,$(OUT)/san/%,$(wildcard tests/tunnel/t_*.c))
C_FUZZ   := $(patsubst tests/tunnel/fuzz/%.c,$(OUT)/san/fuzz-%,$(wildcard tests/tunnel/fuzz/*.c))

$(OUT)/san/%.o: tunnel/%.c $(SAN_HDR) build.mk
	@mkdir -p $(@D)
	@$(CLANG) $(SAN) -fsanitize=fuzzer-no-link,address,undefined -c -o $@ $<

$(OUT)/san/libtunnel.a: $(SAN_OBJ)
	@rm -f $@ && ar rc $@ $^

$(OUT)/san/t_%: tests/tunnel/t_%.c $(OUT)/san/libtunnel.a
	@$(CLANG) $(SAN) -fsanitize=address,undefined -o $@ $< $(OUT)/san/libtunnel.a -lcmocka $(SAN_LIBS)

$(OUT)/san/fuzz-%: tests/tunnel/fuzz/%.c $(OUT)/san/libtunnel.a
	@$(CLANG) $(SAN) -fsanitize=fuzzer,address,undefined -o $@ $< $(OUT)/san/libtunnel.a $(SAN_LIBS)

# Kept between runs: make would take them for intermediate files.
.SECONDARY: $(C_TESTS) $(C_FUZZ)

.PHONY: check-c fuzz-c fuzz-channel lint
check: lint check-c fuzz-c fuzz-channel
check-c: $(C_TESTS:%=%.run)
fuzz-c: $(C_FUZZ:%=%.run)

# A test that prints nothing passed; its output is shown when it fails.
$(OUT)/san/t_%.run: $(OUT)/san/t_%
	@echo "check: $(<F)"
	@$< >$<.log 2>&1 || { tail -n 60 $<.log; exit 1; }

$(OUT)/san/fuzz-%.run: $(OUT)/san/fuzz-%
	@echo "fuzz: $* for $(FUZZ) s"
	@mkdir -p $(OUT)/corpus/$*
	@$< -max_total_time=$(FUZZ) -timeout=10 -rss_limit_mb=2048 -artifact_prefix=$(OUT)/ $(OUT)/corpus/$* $(wildcard tests/tunnel/fuzz/$*) \
	  >$<.log 2>&1 || { tail -n 60 $<.log; exit 1; }

# The data path with real sockets: the tests' harness starts its engines with this extension, and a report of a sanitizer
# fails the test (tests/harness/sanitized.py). Deselected: what measures memory, or is long because of its numbers.
SAN_EXT   := $(OUT)/san/sidestep/_tunnel.abi3.so
SAN_TESTS := tests/tunnel/test_peers.py tests/tunnel/test_envoy.py tests/tunnel/test_streams.py tests/tunnel/test_routes.py
SAN_ONLY  := not readers_that_stop and not thousand and not new_certificates and not (two_hundred and 6)

$(SAN_EXT): $(OUT)/.ext $(SAN_OBJ)
	@mkdir -p $(@D)
	@$(CLANG) $(SAN) -I$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))') -fsanitize=address,undefined \
	  -shared-libasan -shared -o $@.new $(OUT)/ext-obj/sidestep._tunnel.c $(SAN_OBJ) $(SAN_LIBS) && mv $@.new $@

.PHONY: check-data-path
check: check-data-path
check-data-path: $(SAN_EXT)
	@echo "check: the data path under ASan and UBSan"
	@SIDESTEP_SANITIZED=$(abspath $(OUT)/san) SIDESTEP_SANITIZER=$$($(CLANG) -print-file-name=libclang_rt.asan-$(shell uname -m).so) \
	  .venv/bin/pytest -q -x -p no:cacheprovider $(SAN_TESTS) -k '$(SAN_ONLY)' \
	  >$(OUT)/san/data-path.log 2>&1 || { tail -n 80 $(OUT)/san/data-path.log; exit 1; }

# The engine's channel is Python: changed packets against the real process.
fuzz-channel: all
	@echo "fuzz: channel for $(FUZZ) s"
	@$(PY) -m tests.harness.fuzz_channel --seconds $(FUZZ)

lint:
	@echo "check: ruff, mypy, clang-format"
	@.venv/bin/ruff check -q .
	@.venv/bin/mypy --no-error-summary
	@clang-format-16 --dry-run -Werror $$(git ls-files '*.c' '*.h')
