"""HTTP endpoints: what a request says, what an answer looks like, who may ask.

Imports `streams`, `routing` and `metrics`. Start reading in app.py, then completions.py.

Tested elsewhere: answer, logprobs and usage in test_completions.py; chat_message in test_tools.py; errors and schema in
test_bad_input.py; health and intake in test_faults.py; response_headers in test_cors.py; served_model in
test_generate_request.py; tokenization in test_models.py.
"""
