"""A teacher behind an OpenAI-compatible API.

teacher    scores tokens and writes answers over HTTP
replies    replies of servers, checked, as arrays
transport  requests with retries, limits and a secret key
"""
