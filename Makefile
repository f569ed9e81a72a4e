# Entry points. Each is complete on a fresh Debian machine that has a Rust toolchain: what else it needs from apt, it
# installs when it needs it. The work is in resources/steps, which says how long each step took.

STEPS := resources/steps

# Handed to `samepage demo`, as in: make demo DEMO_ARGS='--vms 16 --guest linux'
DEMO_ARGS ?=
# Tests that run at a time in one test program. Guests are CPU bound, so more than this only makes each of them slower.
TEST_THREADS ?= 2
# Handed to the test programs, as in: make test TEST_ARGS='linux_guest'
TEST_ARGS ?=
export DEMO_ARGS TEST_THREADS TEST_ARGS

.DEFAULT_GOAL := help
.PHONY: help density density-quick demo test test-loom test-deep miri openapi siege lint guest build clean

help: ## List the targets
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo
	@echo 'Settings: DEMO_ARGS=... TEST_ARGS=... TEST_THREADS=$(TEST_THREADS)'
	@echo 'SAMEPAGE_SKIP_KVM=1 leaves out what needs /dev/kvm.'

density: ## Measure docs/density.md anew: real guests beside kernel KSM and beside no merging (90 minutes)
	@$(STEPS) density packages guest density

density-quick: ## The same with few guests, for a look: a table on the terminal, nothing is kept (9 minutes)
	@$(STEPS) density-quick packages guest density_quick

demo: ## Build the release binary, run VMs on it and watch their memory merge
	@$(STEPS) demo packages release demo

test: ## Run everything a change must pass: format, lints, documents, tests
	@$(STEPS) test packages format lints docs loom guest tests

test-loom: ## Run only the models of the shutdown protocol and their mutants (part of test)
	@$(STEPS) test-loom packages loom

test-deep: ## Run the models with more preemptions, and 200,000 random histories of the engine
	@$(STEPS) test-deep packages loom random

miri: ## Run tests of the pure modules of dedup and vmm under Miri, which needs a nightly toolchain (some minutes)
	@$(STEPS) miri packages miri

openapi: ## Send 10,000 requests made from the OpenAPI document by schemathesis, which pip installs (some minutes)
	@$(STEPS) openapi packages release openapi

siege: ## Besiege one server with hostile clients and guests, in a cgroup of 1 GiB; needs root (a quarter of an hour)
	@$(STEPS) siege packages guest siege

lint: ## Run only the checks that need no guest: format, lints, documents, house rules
	@$(STEPS) lint packages format lints docs house

guest: ## Build the guests that the tests boot (kernel, initramfs, Debian image), cached by their inputs
	@$(STEPS) guest guest

build: ## Build the release binary, target/release/samepage
	@$(STEPS) build packages release

clean: ## Remove what was built; the cached guests stay
	@$(STEPS) clean clean
