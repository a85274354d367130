"""Ask another model what an answer says, where no rule can tell: any service that speaks OpenAI's protocol.

    prompt, temperature -> judge -> what it said, or JudgeError
    prompt -> ask (several tries) -> what could be read in it, or None and why not

VLMEvalKit asks so too. What it tells the judge is its own text; here stand ours, with the same rules, and the question
is laid out as there. So a judge may decide otherwise now and then: the report lists that as a difference. Where all
tries fail it draws a letter by chance; here nothing was found, which is wrong.
Source: VLMEvalKit @00e0cf87, vlmeval/dataset/utils: multiple_choice.py, yorn.py, mathvista.py, mmvet.py. Protocol:
https://platform.openai.com/docs/api-reference/chat
"""
from __future__ import annotations

import email.utils
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from minivl.limits import InputError, clip, is_there, reading
from weights_tools.files import held_file, told

TRIES = 3               # of one call, where the service is busy or out of reach
PAUSE = 1.0             # seconds before the second try, twice as many before each next one
LONGEST_PAUSE = 30.0    # what a service may ask for
GIVEN_UP = 8            # calls that failed in a row
MOST_BYTES = 2**20      # of a reply
MOST_TOKENS = 128


class JudgeError(Exception):
    """Say why a judge gave no answer."""


# ---- what a judge is asked ------------------------------------------------------------------------------------------

MCQ = """\
Somebody answered a multiple-choice question in free words. Decide which of its options that answer means.
Reply with the capital letter of the option that is closest in meaning, and with nothing else. Reply Z when the answer
means none of the options, or does not answer at all.

Question: Which animal stands on the roof??
Options: A. stork B. cow C. goat D. cat
Answer: There is a big white bird up there.
Your output: A

Question: Which animal stands on the roof??
Options: A. stork B. cow C. goat D. cat
Answer: I see a ladder.
Your output: Z

Question: {}?
Options: {}
Answer: {}
Your output: """

MCQ_CHINESE = """\
有人用自己的话回答了一道单选题。请判断这个回答指的是哪个选项。
只回复意思最接近的选项的大写字母，不要写别的。如果回答与所有选项的意思都不同，或者根本没有回答，请回复 Z。

问题: 屋顶上站着什么动物?
选项: A. 鹳 B. 牛 C. 山羊 D. 猫
答案: 上面有一只白色的大鸟。
输出: A

问题: 屋顶上站着什么动物?
选项: A. 鹳 B. 牛 C. 山羊 D. 猫
答案: 我看到一架梯子。
输出: Z

问题: {}?
选项: {}
答案: {}
输出: """

YES_NO = """\
Somebody answered a question in free words. Decide whether that answer means Yes or No.
Reply with one word: Yes, No, or Unknown where it means neither.

Question: Does the sign show a deer??
Answer: A deer is painted on it.
Your output: Yes

Question: Does the sign show a deer??
Answer: It only warns of ice.
Your output: No

Question: {}?
Answer: {}
Your output: """

MATH = """\
Take the final answer out of a response, in the form that the hint asks for. Reply with it and with nothing else.

Hint: Please answer with a whole number.
Question: How many windows has the tower?
Model response: On each of the four sides there are three, so it has 12 windows.
Extracted answer: 12

Hint: Please answer with a number of one decimal place.
Question: What share of the boats is red?
Model response: Two of five boats are red. That is 0.4 of them.
Extracted answer: 0.4

Hint: Please answer with a number of two decimal places.
Question: What do a pear and a plum cost together?
Model response: 0.35 and 0.90 make 1.25 euros.
Extracted answer: 1.25

Hint: Please answer with a Python list.
Question: Between which years did the line fall most?
Model response: The steepest fall lies between 1998 and 2001.
Extracted answer: [1998, 2001]

Hint: Please answer with the letter of an option.
Question: Which part of the disc is shaded?
Choices: (A) 1/4 (B) 1/3 (C) 1/2
Model response: One of three equal parts is shaded, so it is a third, (B).
Extracted answer: B

{}
Model respone: {}Extracted answer:"""       # "respone": as the original lays it out

VET = """\
Say how right a prediction is, compared with the ground truth: 0.0 for entirely wrong, 0.1, 0.2 and so on to 1.0 for
entirely right. Where the ground truth joins things by <AND>, it is entirely right only when all of them are there;
where it joins them by <OR>, when any one of them is. Fill in the last cell, with a number and nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which two towns does the sign name? | Arles <AND> Nîmes | It names Lyon. | 0.0
Which two towns does the sign name? | Arles <AND> Nîmes | It names Arles. | 0.5
Which two towns does the sign name? | Arles <AND> Nîmes | Nîmes and Lyon | 0.5
Which two towns does the sign name? | Arles <AND> Nîmes | Arles, and further away Nîmes | 1.0
How high is the mast? | 20 m <OR> 65 feet | It is about 65 feet high. | 1.0
Why is the shop shut? | It is a holiday: the note on the door says that the owner is back on Monday. | \
The shop is shut because of some note. | 0.3
Why is the shop shut? | It is a holiday: the note on the door says that the owner is back on Monday. | \
The owner is away and will be back on Monday, as the note says, so it is a holiday. | 1.0

{} | {} | {} | """


def option_prompt(question: str, choices: Mapping[str, str], answer: str) -> str:
    """Write what decides which option an answer means; in Chinese where the question is."""
    options = "There are several options: \n" + "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    return (MCQ_CHINESE if is_chinese(question) else MCQ).format(question, options, answer)


def is_chinese(text: str) -> bool:
    """Tell whether a text has a character of U+4E00 to U+9FFF, as VLMEvalKit does."""
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def yes_no_prompt(question: str, answer: str) -> str:
    """Write what decides whether an answer means yes or no."""
    return YES_NO.format(question, answer)


def math_prompt(question: str, answer: str) -> str:
    """Write what takes the final answer out of a reasoning, for MathVista."""
    return MATH.format(question, answer)


def vet_prompt(question: str, truth: str, answer: str) -> str:
    """Write what says how right an answer is, 0 to 1, for MMVet."""
    return VET.format(question, truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> "), answer)


def ask(judge: Callable[[str, float], str], prompt: str, read: Callable[[str], object], tries: int,
        warmer: float = 0.5) -> tuple[object, str]:
    """Ask up to `tries` times, each time `warmer` by so much, until `read` makes something of what the judge says.

    read: what was said -> what it means, or None. Returns that and what was said, clipped; or None and why.
    """
    failed = Counter()
    for i in range(tries):
        try:
            said = judge(prompt, i * warmer)
        except JudgeError as error:
            failed[str(error)] += 1
            continue
        value = read(said)
        if value is not None:
            return value, clip(said)
        failed[f"said {clip(said, 60)!r}"] += 1
    return None, "the judge " + "; ".join(f"{why} ({times}x)" if times > 1 else why for why, times in failed.items())


# ---- the service ----------------------------------------------------------------------------------------------------

class Judge:
    """A service with POST /v1/chat/completions. `judge(prompt, temperature)` -> what it says, or JudgeError.

    url: of the service, with or without /v1 and what follows. key: sent as bearer token. seconds: of one try, all in
    all. Where it is busy (HTTP 429, 5xx), out of reach or too slow, it is asked again, 3 times in all. After 8 calls
    that failed it is asked no more. Raises InputError for a URL that is none.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None, *, seconds: float = 60.0,
                 pause: float = PAUSE):
        self.url = completions(url)
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise InputError("the judge's key has characters that no key has, perhaps the end of a line; set it anew")
        self.key = key or None
        self.model = model
        self.seconds = seconds
        self.pause = pause
        self.name = f"{model or 'the model'} of {self.url}"     # by which what it said is kept
        self.failed = 0                                         # calls in a row
        self.why = ""
        # No redirects: they would carry the key and the questions to another place than the one given.
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, prompt: str, temperature: float) -> str:
        if self.failed >= GIVEN_UP:
            raise JudgeError(f"was not asked, after {self.failed} calls that failed: {self.why}")
        try:
            said = self._try(prompt, temperature)
        except JudgeError as error:
            self.failed += 1
            self.why = str(error)
            raise
        self.failed = 0
        return said

    def _try(self, prompt: str, temperature: float) -> str:
        body = {"messages": [{"role": "user", "content": prompt}], "temperature": temperature,
                "max_tokens": MOST_TOKENS}
        if self.model is not None:
            body["model"] = self.model
        for last in range(1, TRIES + 1):
            try:
                return said_in(_within(self.seconds, lambda: self._post(json.dumps(body).encode())))
            except _Busy as busy:
                if last == TRIES:
                    raise JudgeError(self._without_key(str(busy))) from None
                time.sleep(min(LONGEST_PAUSE, max(busy.wait, self.pause * 2**(last - 1))))
            except JudgeError as error:
                raise JudgeError(self._without_key(str(error))) from None

    def _post(self, body: bytes) -> bytes:
        """Send one request. Raises _Busy where another try may help, else JudgeError."""
        headers = {"Content-Type": "application/json", "User-Agent": "minivl"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=self.seconds) as reply:
                got = reply.read(MOST_BYTES + 1)
                if reply.length and len(got) <= MOST_BYTES:     # read(n) is content with less than was announced
                    raise http.client.IncompleteRead(got, reply.length)
        except urllib.error.HTTPError as error:
            raise _status(error) from None
        except TimeoutError:
            raise _Busy(f"did not answer within {self.seconds:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Busy(f"did not answer within {self.seconds:g} seconds") from None
            raise _Busy(f"cannot be reached: {clip(error.reason)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Busy(f"closed the connection: {clip(error) or type(error).__name__}") from None
        if len(got) > MOST_BYTES:
            raise JudgeError(f"sent more than {MOST_BYTES} bytes")
        return got

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "...") if self.key else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args):
        return None         # urllib then raises an HTTPError with the status


class _Busy(JudgeError):
    """Say what may be over at the next try, and how many seconds the service asks to wait."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


def completions(url: str) -> str:
    """Complete the URL of a service: http://host, http://host/v1 and the whole URL are the same. Raises InputError."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        port = parts.port
    except ValueError:
        parts = port = None
    if not parts or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError(f"the judge {clip(url)!r} is no URL; give http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError("the judge's URL holds more than a place; give http://HOST:PORT/PATH, and its key by the "
                         "environment")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    path = path if path.endswith("/v1") else f"{path}/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def said_in(reply: bytes) -> str:
    """Take what a service says out of its reply. Raises JudgeError."""
    try:
        message = json.loads(reply)["choices"][0]["message"]
        said = message["content"]
        refusal = message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise JudgeError(f"sent what is no chat completion: {_start(reply)}") from None
    if isinstance(said, str) and said:
        return said.encode("utf-8", "replace").decode()     # half a surrogate pair could not be written anywhere
    if refusal:
        raise JudgeError(f"refused: {clip(ascii(refusal))}")
    raise JudgeError("sent an answer without text")


def _start(body: bytes) -> str:
    return repr(clip(body.decode("utf-8", "replace").strip(), 100))


def _status(error: urllib.error.HTTPError) -> JudgeError:
    """Say what a status other than 200 means."""
    try:
        body = error.read(2000)
    except (OSError, http.client.HTTPException):
        body = b""
    why = f"answered with HTTP {error.code}: {_start(body)}"
    if error.code == 429 or error.code >= 500:
        return _Busy(why, _seconds(error.headers.get("Retry-After")))
    return JudgeError(why)


def _seconds(retry_after: str | None) -> float:
    """Read the header Retry-After: seconds, or a date; 0 for what is neither (RFC 9110, 10.2.3)."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Run work() in a thread for at most so many seconds: a socket's own timeout bounds each wait, not the whole."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _Busy(f"did not answer within {seconds:g} seconds")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# ---- what was said is kept ------------------------------------------------------------------------------------------

class Cached:
    """A judge that is not asked twice: what it says is kept in a file, a JSON line each, and given again from there.

    The first call of a prompt gets the first line of it, the second the second, so that a run repeated on the file
    makes the same verdicts. What failed is not kept: the next run asks again. A judge of another name has lines of its
    own. Raises InputError where the file cannot be read.
    """

    def __init__(self, judge: Callable[[str, float], str], path: str | Path):
        self.judge = judge
        self.path = Path(path)
        self.name = getattr(judge, "name", "")
        self._kept = defaultdict(list)      # (prompt, temperature) -> what was said, call by call
        self._given = Counter()
        if is_there(self.path):
            with reading(self.path):
                lines = self.path.read_bytes().splitlines()
            for line in lines:
                self._take(line)

    def __call__(self, prompt: str, temperature: float) -> str:
        key = prompt, temperature
        call = self._given[key]
        if call == len(self._kept[key]):
            said = self.judge(prompt, temperature)
            self._kept[key].append(said)
            self._keep({"judge": self.name, "prompt": prompt, "temperature": temperature, "said": said})
        self._given[key] += 1
        return self._kept[key][call]

    def _take(self, line: bytes):
        """Read a line; one that a killed run has left half done is asked again."""
        try:
            row = json.loads(line)
            if row["judge"] == self.name and isinstance(row["said"], str):
                self._kept[row["prompt"], row["temperature"]].append(row["said"])
        except (ValueError, LookupError, TypeError, RecursionError):
            pass

    def _keep(self, row: dict):
        with told(self.path, "what is judged so far stays there"), held_file(self.path) as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            torn = end and file.read(1) != b"\n"
            file.seek(end)
            file.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")
