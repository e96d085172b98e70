# Two commands: make demo trains five rules on bundled images and compares them, make test runs the tests.
.PHONY: demo test results docs lint lock
RUNS = runs/demo

demo: .venv/ready
	.venv/bin/nobackprop --multirun rule=bp,fa,dfa,mdfa,lra_e dataset=digits seeds=3 max_epochs=30 paths.runs=$(RUNS)
	.venv/bin/python scripts/compare.py $(RUNS) --against bp

test: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile

# Tables, figures and verdicts, from results/records: nothing is trained.
results: .venv/ready
	.venv/bin/python scripts/tables.py

# The site, complete without a network: open site/index.html. A dead link is an error.
docs: .venv/ready
	.venv/bin/sphinx-build --quiet --fail-on-warning --keep-going docs site

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

# The lock holds hashes and no addresses, for all platforms and Python 3.11 to 3.13.
lock:
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --all-extras pyproject.toml -o requirements.lock

.venv/ready: requirements.lock pyproject.toml scripts/environment.sh
	./scripts/environment.sh
