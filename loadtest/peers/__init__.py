"""Other servers with the same model, measured like Slatewise: `python -m loadtest.peers`.

Called by: the command line. Calls: `slatewise_train/demo/reference.py` (the bundle and its graph rank.onnx).
"""
