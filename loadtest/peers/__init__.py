"""Textbook servers of the same ranker, beside our own: `python -m loadtest.peers`.

Before: `models/slatewise_train/demo/reference.py` (the bundle and its graph rank.onnx). After: build/peers/report/.
"""
