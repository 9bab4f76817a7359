"""Chat templates of model families, written after their documented behaviour, each with a small
tokenizer of its family's kind.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.support.tokenizers_for_tests import metaspace

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{ 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ m['content'] | tojson }}{{ '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{{ bos_token }}{% for m in loop_messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] }}"
    "{{ ' [/INST]' }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}"
    "{% endif %}{% endfor %}"
)
_GEMMA_TURNS = (
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set rest = messages %}{% set first = '' %}" + _GEMMA_TURNS
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% else %}{% set rest = messages %}"
    "{% set first = '' %}{% endif %}" + _GEMMA_TURNS
)
QWEN_2_5 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' }}"
    "{{ m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=messages | length) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts + '\n</think>\n\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m['role'] in ('user', 'system') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + m['content'].split('</think>')[-1] }}"
    "{{ '<\uff5cend▁of▁sentence\uff5c>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}"
)
DEEPSEEK_V3_1 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<\uff5cAssistant\uff5c></think>' }}"
    "{{ m['content'].split('</think>')[-1] + '<\uff5cend▁of▁sentence\uff5c>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}"
    "{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SMOLLM_3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set mode = '/think' if enable_thinking else '/no_think' %}"
    "{% set first = messages[0] %}{% set custom = 'You are a helpful assistant.' %}"
    "{% if first['role'] == 'system' %}{% set custom = first['content'].rstrip() %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') }}"
    "{{ '\nReasoning Mode: ' + mode + '\n\n' + custom + '<|im_end|>\n' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m['content'].lstrip('\n') + '<|im_end|>\n' }}{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if mode == '/no_think' %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
COMMAND_R = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set content = m['content'] %}{% if m['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    "{{ content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = 'Knowledge Cutoff Date: April 2024."
    "\nToday\\'s Date: ' + strftime_now('%B %d, %Y') + '.\nYou are Granite.' %}"
    "{% if thinking %}{% set system = system + ' Write your thoughts after <think>.' %}{% endif %}"
    "{% set rest = messages %}{% endif %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{% for m in rest %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] }}"
    "{{ '<|end_of_text|>\n' }}{% if loop.last and add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}{% endfor %}"
)
GPT_OSS = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "{{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') }}"
    "{{ '\n\nReasoning: ' + reasoning_effort + '<|end|>' }}"
    "{% if messages[0]['role'] in ('developer', 'system') %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0]['content'] + '<|end|>' }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% elif m['role'] == 'tool' %}{{ '<|start|>functions.f to=assistant<|channel|>commentary' }}"
    "{{ '<|message|>' + m['content'] | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ 'System: ' }}{% elif m['role'] == 'user' %}{{ 'User: ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Falcon: ' }}{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GLM_4_5 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n<think></think>\n' + m['content'].split('</think>')[-1].strip() }}"
    "{% elif m['role'] == 'tool' %}{{ '<|observation|>\n' + m['content'] }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>\n' }}"
    "{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template with the options of its family's tokenizer.

    Attributes:
        options: options of `save_subwords`.
        takes_system: whether the template writes a system message.
        given: part of the refusal of answers given as text; empty if they are trained on exactly as
            the template writes them, None if the template writes an empty thought before them.
        arguments: template arguments under which given answers meet their prompt.
    """

    template: str
    options: dict[str, Any] = field(default_factory=dict)
    takes_system: bool = True
    given: str | None = ""
    arguments: dict[str, Any] = field(default_factory=dict)


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_2 = {"kind": metaspace, "special": ("<s>", "</s>"), "bos": "<s>", "eos": "</s>"}
_GEMMA = {
    "kind": metaspace,
    "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "bos": "<bos>",
    "eos": "<eos>",
    "adds": ("<bos>",),
}
_DEEPSEEK = {
    "special": ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
    "plain": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"),
    "bos": "<\uff5cbegin▁of▁sentence\uff5c>",
    "eos": "<\uff5cend▁of▁sentence\uff5c>",
    "adds": ("<\uff5cbegin▁of▁sentence\uff5c>",),
}
_OPENS_THOUGHTS = "opens thoughts, and an answer that is given as text would stand in them"
FAMILIES = {
    "chatml": Family(CHATML),
    "llama-2": Family(LLAMA_2, _LLAMA_2 | {"adds": ("<s>",)}),
    "llama-3": Family(
        LLAMA_3,
        {
            "special": (
                *("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
            ),
            "bos": "<|begin_of_text|>",
            "eos": "<|eot_id|>",
            "adds": ("<|begin_of_text|>",),
        },
    ),
    "mistral": Family(MISTRAL, _LLAMA_2 | {"special": ("<s>", "</s>", "[INST]", "[/INST]")}),
    "gemma-2": Family(GEMMA_2, _GEMMA, takes_system=False),
    "gemma-3": Family(GEMMA_3, _GEMMA),
    "qwen-2.5": Family(QWEN_2_5),
    "qwen-3": Family(
        QWEN_3,
        {"plain": ("<think>", "</think>")},
        given=None,
        arguments={"enable_thinking": False},
    ),
    "deepseek-r1": Family(DEEPSEEK_R1, _DEEPSEEK, given=_OPENS_THOUGHTS),
    "deepseek-v3.1": Family(DEEPSEEK_V3_1, _DEEPSEEK),
    "deepseek-v3.1 thinking": Family(
        DEEPSEEK_V3_1.replace("set thinking = false", "set thinking = true"),
        _DEEPSEEK,
        given=_OPENS_THOUGHTS,
        arguments={"thinking": False},
    ),
    "phi-3": Family(
        PHI_3,
        {
            "special": ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            "eos": "<|endoftext|>",
        },
    ),
    "phi-4": Family(PHI_4, {"special": (*_IM, "<|im_sep|>")}),
    "smollm-3": Family(SMOLLM_3, {"plain": ("<think>", "</think>")}),
    "zephyr": Family(ZEPHYR, _LLAMA_2 | {"adds": ("<s>",)}),
    "command-r": Family(
        COMMAND_R,
        {
            "special": (
                *("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"),
                *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
            ),
            "bos": "<BOS_TOKEN>",
            "eos": "<|END_OF_TURN_TOKEN|>",
            "adds": ("<BOS_TOKEN>",),
        },
    ),
    "granite": Family(
        GRANITE,
        {
            "special": ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
            "eos": "<|end_of_text|>",
        },
    ),
    "gpt-oss": Family(
        GPT_OSS,
        {
            "special": (
                *("<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
                "<|startoftext|>",
            ),
            "eos": "<|return|>",
        },
        given=r"writes '<\|channel\|>final<\|message\|>' before an answer",
    ),
    "olmo": Family(
        OLMO, {"special": ("<|endoftext|>",), "bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    ),
    "falcon": Family(FALCON, {"special": ("<|endoftext|>",), "eos": "<|endoftext|>"}),
    "vicuna": Family(VICUNA, _LLAMA_2),
    "glm-4.5": Family(
        GLM_4_5,
        {
            "special": (
                *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
            ),
            "plain": ("<think>", "</think>"),
            "eos": "<|endoftext|>",
        },
        given=None,
        arguments={"enable_thinking": False},
    ),
}
