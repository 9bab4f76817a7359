"""A teacher behind an OpenAI-compatible API.

teacher      the teacher: start, canary, score, generate
completions  rows and answers over HTTP, with the checks of their replies
answers      answers in text, in the dialects of servers
replies      replies of servers, checked, as arrays
batches      requests that wait in batches, found again by their records
forms        the first request of each form alone, and forms that a server never accepts
reading      content of replies up to a bound, inflated
transport    requests with retries, limits and a secret key
"""
