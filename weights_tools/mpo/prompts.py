"""What a model is asked, so that its answers can be judged: to reason first, and to end in a form that can be read.

Source: InternVL internvl_chat/tools/reasoning_data_pipeline/mmpr_data_pipeline_correctness.py:89-136,
mmpr_data_pipeline_dropout_ntp.py:195-213, utils/constants.py @2410d1d; en and zh are of the card's time too.
"""
from __future__ import annotations

from minivl.limits import InputError, clip
from minivl.prompt import IMAGE
from weights_tools.mpo.scorers import checked

LETTER = "Answer with the option's letter from the given choices directly."
SUFFIXES = ("Answer the question using a single word or phrase.", LETTER, "Please answer Yes or No.")
BOXED_SUFFIX = "Please answer the question and put the final answer within \\boxed{}."       # head cuts it too

R1 = """You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason \
through the problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer \
from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone \
and not reference the thinking section.
"""
ASKED = "asked"     # not the original's: the question as it stands, for models that do not know the others
# Models were trained to read exactly this.
PROMPTS = {
    "en": "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're "
          'ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n{question}',
    "zh": "你的任务是回答以下问题。在回答之前，请逐步推理说明您的思路。当你准备好给出答案时，"
          '请使用以下格式："答案: ..."\n\n问题:\n\n{question}',
    "en_v2": "{question}\nAnswer the preceding question. The last line of your response should follow this format: "
             "'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion based on the "
             "reasoning provided. If you are uncertain or the problem is too complex, make a reasoned guess based on "
             "the information provided. Avoid repeating steps indefinitely—provide your best guess even if unsure. "
             "Think step by step logically, considering all relevant information before answering.",
    "zh_v2": "{question}\n请回答上述问题。你的回答最后一行应遵循以下格式：“答案：\\boxed{$FINAL_ANSWER}”"
             "（不包含引号），其中“FINAL_ANSWER”是你根据推理得出的最终结论。"
             "如果你不确定答案或问题过于复杂，请基于已有信息做出有理有据的猜测。"
             "避免无限重复推理步骤——即使不完全确定，也请给出你认为最合理的答案。"
             "请一步一步进行逻辑思考，充分考虑所有相关信息后再作答。",
    "en_r1": f"{R1}{{question}}\n{BOXED_SUFFIX}",
    "zh_r1": f"{R1}{{question}}\n请详细回答这个问题并将最终答案用\\boxed{{}}包住。",
    ASKED: "{question}",
}


def prompt(question: str, version: str = "en", *, picture: bool = True, rules: str = "dec2024") -> str:
    """Write what the model is asked: the question, without "answer in one word" at its end, in a template.

    picture: one <image> goes to the front; where several stand in the question they stay. Version "asked": the question
    as it stands.
    """
    if version == ASKED:
        return question
    for suffix in SUFFIXES if checked(rules) == "dec2024" else (*SUFFIXES, BOXED_SUFFIX):
        if question.endswith(suffix):
            question = question.removesuffix(suffix).strip()
    text = PROMPTS[known_version(version)].replace("{question}", question)
    if not picture:
        return text
    if text.count(IMAGE) == 1:
        text = text.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
    return text if IMAGE in text else f"{IMAGE}\n{text}"


def without_picture(question: str) -> str:
    """Return a question as Dropout-NTP asks it: no picture, and no mark where one was."""
    return question.replace(IMAGE, "").strip()


def known_version(version: str) -> str:
    """Return a prompt version; raise InputError where it is not known."""
    if not isinstance(version, str) or version not in PROMPTS:
        raise InputError(f"there is no prompt version {clip(version)!r}; there are {', '.join(PROMPTS)}")
    return version
