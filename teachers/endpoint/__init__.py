"""A teacher behind an OpenAI-compatible API.

teacher      the teacher: start, canary, score, generate
completions  rows and answers over HTTP, with the checks of their replies
replies      replies of servers, checked, as arrays
transport    requests with retries, limits and a secret key
"""
