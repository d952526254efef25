# make help        these lines
# make demo        data, both stages, scores and a table; four to seven minutes on two cores after installation
# make demo-data   only the demo's data set
# make test        lint and tests
# make test-slow   slow tests: repeated kills, fuzzing, data of VQA v2's size
# make ablations   trains and scores fourteen variants of the demo with three seeds each; about an hour on two cores
# make walkthrough runs docs/walkthrough.ipynb and stores its outputs; one to four minutes on two cores
# make lint        only lint (ruff)
# make install     only the installation into .venv
# make clean       deletes the output of demo, ablations and benchmarks; keeps .venv and all other runs
PYTHON ?= python3
PY = .venv/bin/python
DEMO_DATA = --data-dir demo/mini_vqa_v2 --cache-dir demo/cache
DEMO_TRAIN = --clip-model local-dir:demo/encoders/clip --gpt2-model demo/encoders/gpt2 \
  --hidden-size 128 --learning-rate 2e-3 --weight-decay 0.05 --epochs 30 --patience 5
DEMO_FINE_TUNE = --epochs 4 --patience 5 --weight-decay 0.05 \
  --learning-rate 1e-3 --clip-learning-rate 1e-3 --gpt2-learning-rate 1e-3
STAGE_1 = output/demo/feature_extraction
STAGE_2 = output/demo/fine_tuning
QUESTION_ONLY = output/demo/question_only
# the question-only floor trains to the end (--patience 30 below): early stopping cost it up to 3 BLEU
DEMO_TEST = $(DEMO_DATA) --question-only-checkpoint $(QUESTION_ONLY)/vqa_checkpoint.pt \
  --true-answers demo/vqa_v2/true_answers.json

.PHONY: help demo demo-data test test-slow ablations walkthrough lint clean install

help:
	@sed -n 's/^# make/make/p' Makefile

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv: takes some minutes, and about 6 GB with the CUDA libraries of torch"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-app.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/installed demo-data
	@echo "== make demo, step 3 of 8: stage 1 trains the model on frozen encoders"
	$(PY) train.py $(DEMO_DATA) --output-dir $(STAGE_1) --overwrite $(DEMO_TRAIN)
	@echo "== make demo, step 4 of 8: stage 2 trains the last blocks of the encoders too"
	$(PY) fine_tune.py $(DEMO_DATA) --checkpoint $(STAGE_1)/vqa_checkpoint.pt --output-dir $(STAGE_2) --overwrite \
	  --clip-layers 4 --gpt2-layers 4 $(DEMO_FINE_TUNE)
	@echo "== make demo, step 5 of 8: a floor to compare with, a model that never sees the image"
	$(PY) train.py $(DEMO_DATA) --inputs question --output-dir $(QUESTION_ONLY) --overwrite $(DEMO_TRAIN) --patience 30
	@echo "== make demo, step 6 of 8: stage 1 answers the test questions"
	$(PY) test.py $(DEMO_TEST) --checkpoint $(STAGE_1)/vqa_checkpoint.pt --results-dir results/demo/stage_1 --num-pictures 0 \
	  --results-csv output/demo/stage_1_results.csv --metrics-json output/demo/stage_1_metrics.json
	@echo "== make demo, step 7 of 8: stage 2 answers the test questions"
	$(PY) test.py $(DEMO_TEST) --checkpoint $(STAGE_2)/vqa_checkpoint.pt --results-dir results/demo \
	  --results-csv output/demo/vqa_test_results.csv --metrics-json output/demo/vqa_test_metrics.json
	@echo "== make demo, step 8 of 8: one table"
	$(PY) demo/show_table.py

demo-data: .venv/installed
	@echo "== make demo, step 1 of 8: draw scenes, with questions and answers"
	$(PY) demo/make_scenes.py
	@echo "== make demo, step 2 of 8: choose rows and split them by image"
	$(PY) mini_vqa_v2.py --vqa-dir demo/vqa_v2 --image-dir demo/vqa_v2/train2014 --output-dir demo/mini_vqa_v2

ablations: .venv/installed demo-data
	$(PY) demo/ablations.py $(DEMO_DATA) --train-flags="$(DEMO_TRAIN)" --fine-tune-flags="$(DEMO_FINE_TUNE)"

walkthrough: .venv/installed-dev
	$(PY) demo/run_walkthrough.py

test: .venv/installed-dev lint
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: .venv/installed-dev
	$(PY) -m pytest -n 2 --dist loadfile -m slow

lint: .venv/installed-dev
	$(PY) -m ruff check .

clean:
	rm -rf demo/vqa_v2 demo/mini_vqa_v2 demo/cache output/demo output/ablations output/walkthrough results/demo benchmarks/results
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
