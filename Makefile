# setup build demo test check bench clean: nothing else to remember.
# Each works as the only command on a fresh clone of a fresh Debian 12 machine (as root: it installs packages and makes network namespaces).

SHELL      := /bin/bash
PY         := .venv/bin/python
CLANG      ?= clang-16
OUT        := build
STAMP_APT  := $(OUT)/.apt
STAMP_VENV := $(OUT)/.venv
CFLAGS_C   := -O2 -g -std=gnu11 -Wall -Wextra -Werror
KEEP       ?=
DEMO_ARGS  ?=
FUZZ       ?= 20

DEBIAN := build-essential clang-16 llvm-16 clang-format-16 libclang-rt-16-dev libbpf-dev bpftool libssl-dev libnghttp2-dev \
	pkg-config libelf-dev zlib1g-dev linux-libc-dev python3 python3-venv python3-dev iproute2 nftables procps util-linux \
	ca-certificates containernetworking-plugins dnsmasq-base tcpdump postgresql python3-psycopg2 redis-server nginx-light wrk \
	libcap2-bin libcmocka-dev curl $(if $(filter x86_64,$(shell uname -m)),libipsec-mb1)

.PHONY: setup build bpffs demo test check bench clean
.DEFAULT_GOAL := setup

setup: build bpffs

$(STAMP_APT): Makefile
	@mkdir -p $(OUT)
	@echo "setup: Debian packages"
	@deploy/install-packages $(DEBIAN)
	@deploy/fetch-kubectl $(OUT)/kubectl
	@touch $@

$(STAMP_VENV): pyproject.toml $(STAMP_APT)
	@echo "setup: Python packages in .venv"
	@test -x $(PY) || /usr/bin/python3 -m venv .venv
	@.venv/bin/pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv/bin/pip install -q --disable-pip-version-check --group dev 'cffi>=2'
	@touch $@

build: $(STAMP_VENV)
	@$(MAKE) --no-print-directory -f build.mk CLANG=$(CLANG) PY=$(PY) OUT=$(OUT) CFLAGS_C="$(CFLAGS_C)"

# The lab's pins live there; a container or a small image may come without it.
bpffs:
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf || \
	  { echo "setup: /sys/fs/bpf must be a bpffs, and only root can mount one" >&2; exit 1; }

demo: setup
	@.venv/bin/python -m examples.shop.demo $(if $(KEEP),--keep) $(DEMO_ARGS)

check: build bpffs
	@$(MAKE) --no-print-directory -f build.mk check CLANG=$(CLANG) PY=$(PY) OUT=$(OUT) CFLAGS_C="$(CFLAGS_C)" FUZZ=$(FUZZ)

# Two at a time, a file's tests one after the other: most of their time is waiting. `PYTEST_ARGS="-n 0 -s"`: one, and what it prints.
test: check
	@.venv/bin/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: setup
	@.venv/bin/python -m tests.bench $(BENCH_ARGS)

clean:
	rm -rf $(OUT) .venv agent/*.egg-info agent/sidestep/*.so agent/sidestep/bin agent/sidestep/wire/pb
