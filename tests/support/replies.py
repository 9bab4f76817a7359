"""Replies that instruction-tuned models typically give to a request for a new prompt."""

OLD = "Ann has 3 apples and buys 4 more. How many has she?"

GOOD_REPLIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": (
        "<prompt>Ann, who had 3 apples, has bought 4. What is her count now?</prompt>",
        ("Ann, who had 3 apples, has bought 4. What is her count now?",),
    ),
    "with chatter": (
        "Sure! Here's a rephrased version of the request:\n\n<prompt>\nAnn owns 3 apples.\n"
        "She gets 4 more.\nWhat is the total?\n</prompt>\n\nLet me know if you want another one!",
        ("Ann owns 3 apples.\nShe gets 4 more.\nWhat is the total?",),
    ),
    "after thoughts": (
        "<think>\nThe user wants <prompt>harder</prompt> text, so I add a step.\n</think>\n\n"
        "<PROMPT>Ann has 3 apples, buys twice as many and eats one. How many are left?</PROMPT>",
        ("Ann has 3 apples, buys twice as many and eats one. How many are left?",),
    ),
    "a question about being sorry": (
        "<prompt>Why do people say that they regret something?</prompt>",
        ("Why do people say that they regret something?",),
    ),
    "a prompt that begins like a refusal": (
        "<prompt>I'm unable to log in to my router. Which steps should I take?</prompt>",
        ("I'm unable to log in to my router. Which steps should I take?",),
    ),
    "an apology as a task": (
        "<prompt>Sorry, I broke my aunt\u2019s vase. Draft an apology of 50 words.</prompt>",
        ("Sorry, I broke my aunt\u2019s vase. Draft an apology of 50 words.",),
    ),
    "an apology before the prompt": (
        "Sorry for the delay! <prompt>As an AI researcher, how would you test a filter?</prompt>",
        ("As an AI researcher, how would you test a filter?",),
    ),
    "several": (
        "1. <prompt>Name three rivers.</prompt>\n2. <prompt>What is a prime number?</prompt>",
        ("Name three rivers.", "What is a prime number?"),
    ),
}

BAD_REPLIES: dict[str, tuple[str, str, str]] = {
    "nothing": ("", "stop", "empty"),
    "white space": ("  \n\n", "stop", "empty"),
    "thoughts alone": ("<think>I should rewrite it.</think>\n", "stop", "empty"),
    "a refusal": (
        "I'm sorry, but I can't help with rewriting this request. If you have another one, I'd be "
        "happy to assist!",
        "stop",
        "refusal",
    ),
    "a refusal with a curly quote": (
        "I\u2019m really sorry, but I can\u2019t do that.",
        "stop",
        "refusal",
    ),
    "a refusal of a machine": (
        "As an AI language model, I do not create tasks.",
        "stop",
        "refusal",
    ),
    "a refusal that declines": ("I'm afraid I can't do that.", "stop", "refusal"),
    "a refusal that will not": ("I won't write about this.", "stop", "refusal"),
    "an answer instead": ("Ann has 3 + 4 = 7 apples.\n#### 7", "stop", "malformed"),
    "an open tag": ("<prompt>Ann has 3 apples and", "stop", "malformed"),
    "empty tags": ("<prompt> </prompt>", "stop", "malformed"),
    "a list where one was asked for": (
        "<prompt>first</prompt>\n<prompt>second</prompt>",
        "stop",
        "malformed",
    ),
    "an echo": (f"<prompt>{OLD.upper()}</prompt>", "stop", "unchanged"),
    "cut in the middle": ("<prompt>Ann has 3 apples and 4 pears and 5", "length", "over_long"),
    "cut behind the prompt": ("<prompt>New</prompt> and so on and so on", "length", "over_long"),
    "a loop that the engine stopped": ("and and and and and and", "repetition", "over_long"),
}
