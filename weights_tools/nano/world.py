"""Nano's world in words: conversations about drawn pictures, endless and seeded.

    example(seed, index) -> Example: pictures, turns of question, answer and task, most tiles

The same seed and index give the same example on every machine. An answer follows from the picture and the conversation
so far alone, word by word, so that "exactly right" can be measured. It names what was asked about before it says
anything of it, and says yes or no last: a small decoder looks a thing up at the word for it, see NOTES.md.
"""
from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass, replace

from minivl.prompt import IMAGE
from weights_tools.nano import draw
from weights_tools.nano.draw import COLOURS, SHAPES, Scene, Style, Thing

PLACES = (("in the top left corner", "at the top", "in the top right corner"),
          ("on the left", "in the middle", "on the right"),
          ("in the bottom left corner", "at the bottom", "in the bottom right corner"))
UNKNOWN_PICTURE = "I cannot tell what this is. I only know shapes, words and numbers."
UNKNOWN = "I cannot tell. I only know shapes, words and numbers."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {s: "crosses" if s == "cross" else s + "s" for s in (*SHAPES, "shape")}
WORDS = """
ACE ACORN ACT ADD AGE AIR ALARM ALBUM ALERT ALL ANGEL ANGLE ANKLE ANT APPLE APRIL APRON ARCH AREA ARM ARROW ART ASH
AUNT AUTUMN AWAY AXE BABY BACK BACON BADGE BAG BAKER BALL BAMBOO BANANA BAND BANK BAR BARN BASKET BAT BATH BEACH BEAN
BEAR BED BEE BELL BELT BENCH BERRY BIKE BIRD BLANK BOAT BODY BONE BOOK BOOT BOTTLE BOWL BOX BOY BRAIN BRANCH BREAD
BRICK BRIDGE BROOM BRUSH BUCKET BUS BUSH BUTTER BUTTON CABIN CABLE CAFE CAGE CAKE CAMEL CAMERA CAMP CANAL CANDLE CANDY
CAP CAR CARD CARPET CARROT CART CASTLE CAT CAVE CELLO CHAIN CHAIR CHALK CHEESE CHERRY CHESS CHEST CITY CLAY CLIFF
CLOCK CLOSED CLOUD CLUB COACH COAT COFFEE COIN COLD COMB CORAL CORN COTTON COUCH COW CRAB CRANE CROWN CUP CURVE DANCE
DANGER DATE DAY DEER DESERT DESK DICE DINNER DISH DOCK DOCTOR DOG DOLL DOOR DOWN DRAGON DREAM DRESS DRILL DRINK DRUM
DUCK DUST EAGLE EAR EARTH EAST EGG ELBOW EMPTY ENGINE ENTER EVENT EXIT EYE FABRIC FACE FAN FARM FEATHER FENCE FERRY
FIELD FIRE FISH FLAG FLAME FLOOR FLOUR FLOWER FLUTE FOG FOOD FOOT FOREST FORK FOX FREE FRESH FROG FROST FRUIT FULL
GAME GARAGE GARDEN GARLIC GATE GHOST GIANT GIFT GINGER GLASS GLOVE GOAT GOLD GOOSE GRAPE GRASS GUITAR HALL HAMMER HAND
HARBOR HAT HAWK HEAT HELP HEN HERO HILL HONEY HOOK HORN HORSE HOT HOTEL HOUR HOUSE ICE INK INN IRON ISLAND IVY JACKET
JAM JAR JAZZ JEWEL JUICE JUMP JUNGLE KETTLE KEY KING KITE KNEE KNIFE KNOT LADDER LAKE LAMP LAND LAWN LEAF LEMON LETTER
LIGHT LILY LION LOCK LUNCH MAGIC MAIL MAP MARBLE MARKET MASK MEADOW MELON MENU METAL MILK MILL MIRROR MONEY MONKEY
MOON MORNING MOTOR MOUSE MOUTH MUSEUM MUSIC NAIL NAME NEEDLE NEST NET NEW NIGHT NORTH NOSE NOTE NUT OAK OASIS OCEAN
OFFICE OIL OLIVE ONION OPEN ORBIT ORGAN OTTER OVEN OWL PAINT PALACE PALM PAN PANDA PAPER PARK PARROT PASTA PATH PEACH
PEAR PEN PENCIL PEPPER PIANO PICNIC PIG PILLOW PILOT PIN PIPE PIZZA PLANE PLANT PLATE PLAY PLUM POCKET POLICE POND
PONY PORT POST POTATO POWER PULL PUMP PUPPY PUSH QUEEN QUIET QUILT QUIZ RABBIT RADIO RAIN RED RIBBON RICE RING RIVER
ROAD ROBOT ROCK ROOF ROOM ROPE ROSE ROUTE RUBY RULER SADDLE SAIL SALAD SALE SALT SAND SAUCE SCARF SCHOOL SEA SEAL SEAT
SEED SHARK SHEEP SHELF SHELL SHIP SHIRT SHOE SHOP SHOVEL SILK SILVER SINK SKATE SKY SLOW SMOKE SNAIL SNAKE SNOW SOAP
SOCK SOFA SOUP SOUTH SPICE SPIDER SPOON SPRING STAGE STAIR STAMP STATUE STONE STOP STOVE STREET STUDIO SUGAR SUMMER
SUN SWAN SWEET SWIM SWORD TABLE TAILOR TAXI TEA TEMPLE TENT TICKET TIGER TILE TIME TOAST TOMATO TOOTH TOWEL TOWER TOWN
TRACK TRAIN TRAY TREE TROUT TRUCK TULIP TUNNEL TURTLE UNCLE UP VALLEY VASE VELVET VIDEO VILLA VIOLIN WAGON WALL WALNUT
WATCH WATER WAVE WAX WEST WHALE WHEAT WHEEL WINDOW WINE WINTER WOLF WOOD WOOL WORLD YARD YEAR ZEBRA ZERO ZONE
""".split()      # noqa: SIM905  easier to read than quoted words
# Every fifth word is never written in training: reading them is reading, not remembering.
HELD_OUT = tuple(w for i, w in enumerate(WORDS) if i % 5 == 2 and 2 <= len(w) <= 6)
TRAINED = tuple(w for i, w in enumerate(WORDS) if i % 5 != 2 and 2 <= len(w) <= 6)


@dataclass(frozen=True)
class Turn:
    """One question, its only right answer, and the row of the report it counts for."""
    question: str
    answer: str
    task: str


@dataclass(frozen=True)
class Example:
    """A conversation. The first question holds one <image> for each picture, with the text a user would write."""
    pictures: tuple     # of Scene
    turns: tuple        # of Turn
    max_num: int = 6

    def messages(self) -> list:
        """Return [(question, answer), ...], as minivl.prompt takes it."""
        return [(turn.question, turn.answer) for turn in self.turns]

    def alone(self, i: int) -> Example:
        """Keep question i by itself, with what stands before the first one: a mark for each picture."""
        turn = self.turns[i]
        marks = "".join(re.findall(r"[^\n]*<image>\n", self.turns[0].question)) if i else ""
        return replace(self, turns=(replace(turn, question=marks + turn.question),))


# ---- words ----------------------------------------------------------------------------------------------------------

def a(phrase: str) -> str:
    """Put the article before it: "a red star", "an orange ring"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def name(thing: Thing, size: bool = True) -> str:
    """Name a thing: "large red star", 'red word "LAMP"'."""
    if thing.is_text:
        return f'{thing.colour} {thing.kind} "{thing.text}"'
    return f"{thing.size + ' ' if size else ''}{thing.colour} {thing.kind}"


def place(thing: Thing) -> str:
    return PLACES[thing.row][thing.column]


def number_of(n: int, adjective: str, noun: str) -> str:
    """Say how many there are: "the number of red stars is two"."""
    return f"the number of {' '.join(filter(None, (adjective, PLURALS[noun])))} is {NUMBERS[n]}"


def listed(phrases: list) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def only(things: list, **wanted) -> Thing | None:
    """Find the one thing with these attributes; None where there is none, or more than one."""
    found = [t for t in things if all(getattr(t, k) == v for k, v in wanted.items())]
    return found[0] if len(found) == 1 else None


def unique(shapes: list) -> list:
    """Keep those that "the star" can mean: the only ones of their kind."""
    return [t for t in shapes if only(shapes, kind=t.kind)]


def two_counts(rng: random.Random, shapes: list, attribute: str) -> tuple | None:
    """Choose two values of an attribute that occur: (value, value, how many have the first, the second), or None."""
    values = [getattr(t, attribute) for t in shapes]
    if len(set(values)) < 2:
        return None
    x, y = rng.sample(sorted(set(values)), 2)
    return x, y, values.count(x), values.count(y)


# ---- questions about one picture ------------------------------------------------------------------------------------
# Each: (rng, scene) -> Turn, or None where the scene has nothing to ask about.

def describe(rng: random.Random, scene: Scene) -> Turn | None:
    things = [*scene.shapes, *scene.texts]
    question = rng.choice(("Describe the picture.", "describe this image", "What do you see?",
                           "What is in the picture?", "Please describe the image shortly.",
                           "What can you see in this image?"))
    if scene.texture is not None:
        return Turn(question, UNKNOWN_PICTURE, "unknown")
    if not things:
        return Turn(question, "The picture is empty.", "describe")
    first, *rest = [(place(t), f"{'the ' + name(t) if t.is_text else a(name(t))}") for t in things]
    said = listed([f"{first[0].capitalize()} there is {first[1]}", *map(" ".join, rest)])
    return Turn(question, f"{said}.", "describe")


def colour(rng: random.Random, scene: Scene) -> Turn | None:
    if scene.texts and (not scene.shapes or rng.random() < 0.5):
        thing = rng.choice(scene.texts)
        noun = f"{thing.kind} {place(thing)}" if len(scene.texts) > 1 else thing.kind
    elif scene.shapes:
        thing = rng.choice(scene.shapes)
        if only(scene.shapes, kind=thing.kind) and rng.random() < 0.6:
            noun = thing.kind
        elif only(scene.shapes, kind=thing.kind, size=thing.size) and rng.random() < 0.5:
            noun = f"{thing.size} {thing.kind}"
        else:
            noun = rng.choice(("shape", thing.kind)) + " " + place(thing)
    else:
        return None
    return Turn(rng.choice((f"What colour is the {noun}?", f"What color is the {noun}?",
                            f"Which colour does the {noun} have?")), f"The {noun} is {thing.colour}.", "colour")


def kind(rng: random.Random, scene: Scene) -> Turn | None:
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    if only(scene.shapes, colour=thing.colour) and rng.random() < 0.5:
        return Turn(rng.choice((f"What shape is {thing.colour}?", f"Which shape is {thing.colour}?",
                                f"What is the {thing.colour} shape?")),
                    f"The {thing.colour} shape is {a(thing.kind)}.", "shape")
    where = place(thing)
    if rng.random() < 0.5:
        return Turn(rng.choice((f"What shape is {where}?", f"Which shape is {where}?")),
                    f"{where.capitalize()} there is {a(thing.kind)}.", "shape")
    return Turn(rng.choice((f"What is {where}?", f"What do you see {where}?")),
                f"{where.capitalize()} there is {a(name(thing))}.", "shape")


def where(rng: random.Random, scene: Scene) -> Turn | None:
    things = [t for t in scene.shapes
              if only(scene.shapes, kind=t.kind) or only(scene.shapes, kind=t.kind, colour=t.colour)]
    things += [t for t in scene.texts if only(scene.texts, kind=t.kind)]
    if not things:
        return None
    thing = rng.choice(things)
    noun = thing.kind
    if not thing.is_text and (not only(scene.shapes, kind=noun) or rng.random() < 0.3):
        noun = f"{thing.colour} {noun}"
    return Turn(rng.choice((f"Where is the {noun}?", f"In which place is the {noun}?",
                            f"Where can you see the {noun}?")),
                f"The {noun} is {place(thing)}.", "place")


def size(rng: random.Random, scene: Scene) -> Turn | None:
    things = unique(scene.shapes)
    if not things:
        return None
    noun = (thing := rng.choice(things)).kind
    return Turn(rng.choice((f"How big is the {noun}?", f"Is the {noun} small or large?", f"What size is the {noun}?")),
                f"The {noun} is {thing.size}.", "size")


def count(rng: random.Random, scene: Scene) -> Turn | None:
    what, adjective, noun = rng.randrange(4), "", "shape"
    if what == 1:
        adjective = rng.choice([t.colour for t in scene.shapes] * 3 + list(COLOURS))
    elif what == 2:
        noun = rng.choice([t.kind for t in scene.shapes] * 3 + list(SHAPES))
    elif what == 3:
        adjective = rng.choice(draw.SIZES)
    found = [t for t in scene.shapes if adjective in ("", t.colour, t.size) and noun in ("shape", t.kind)]
    many = " ".join(filter(None, (adjective, PLURALS[noun])))
    return Turn(rng.choice((f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}.")),
                f"{number_of(len(found), adjective, noun).capitalize()}.", "count")


def yes_no(rng: random.Random, scene: Scene) -> Turn | None:
    """Ask whether something is so; half of the questions are to be answered with no."""
    yes = rng.random() < 0.5
    task = so = "yes" if yes else "no"
    shapes, what = scene.shapes, rng.randrange(6)
    if scene.texts and (not shapes or rng.random() < 0.5):
        text = scene.texts[0] if len(scene.texts) == 1 else None
        if text is None:
            return None
        if yes:
            return Turn(f'Does it say "{text.text}"?', f'It says "{text.text}", so yes.', task)
        other = near(rng, text)
        return Turn(f'Does it say "{other}"?', f'It says "{text.text}", so no.', task)
    if what == 0:           # is there a star?
        present = sorted({t.kind for t in shapes})
        pool = present if yes else [s for s in SHAPES if s not in present]
        if not pool:
            return None
        noun = rng.choice(pool)
        question = rng.choice((f"Is there {a(noun)}?", f"Do you see {a(noun)}?", f"Is there {a(noun)} in the picture?"))
        return Turn(question, f"{a(noun).capitalize()} is {'' if yes else 'not '}in the picture, so {so}.", task)
    if what in (1, 2):      # is there a red star?
        pairs = {(t.colour, t.kind) for t in shapes}
        if yes:
            pool = sorted(pairs)
        else:               # mostly a wrong pair of a colour and a shape that are both there
            pool = sorted({(c, s) for c, _ in pairs for _, s in pairs} - pairs) if rng.random() < 0.7 else []
            pool = pool or [p for p in ((c, s) for c in COLOURS for s in SHAPES) if p not in pairs]
        if not pool:
            return None
        noun = " ".join(rng.choice(pool))
        question = rng.choice((f"Is there {a(noun)}?", f"Do you see {a(noun)}?", f"Can you see {a(noun)}?"))
        return Turn(question, f"{a(noun).capitalize()} is {'' if yes else 'not '}in the picture, so {so}.", task)
    thing = rng.choice(unique(shapes) or [None])
    if what == 5 or thing is None:
        n = len(shapes)
        if not n:
            return None
        said = n if yes else rng.choice([m for m in range(1, 7) if m != n])
        question = "Is there one shape?" if said == 1 else f"Are there {NUMBERS[said]} shapes?"
        return Turn(question, f"{number_of(n, '', 'shape').capitalize()}, so {so}.", task)
    if what == 3:           # is the star red?
        said = thing.colour if yes else rng.choice([c for c in COLOURS if c != thing.colour])
        return Turn(f"Is the {thing.kind} {said}?", f"The {thing.kind} is {thing.colour}, so {so}.", task)
    said = place(thing) if yes else rng.choice([p for row in PLACES for p in row if p != place(thing)])
    return Turn(f"Is the {thing.kind} {said}?", f"The {thing.kind} is {place(thing)}, so {so}.", task)


def near(rng: random.Random, text: Thing) -> str:
    """Make another word or number, often one that differs in a single character."""
    letters = "0123456789" if text.text.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if rng.random() < 0.5 or text.text.isdigit():
        i = rng.randrange(len(text.text))
        return text.text[:i] + rng.choice([c for c in letters if c != text.text[i]]) + text.text[i + 1:]
    return rng.choice([w for w in TRAINED if w != text.text])


def false_premise(rng: random.Random, scene: Scene) -> Turn | None:
    """Ask about what is not there."""
    absent = [s for s in SHAPES if not any(t.kind == s for t in scene.shapes)]
    what = rng.randrange(5)
    if what == 0 and not any(t.is_text for t in scene.things):
        return Turn(rng.choice(("What does it say?", "What is written here?", "Read the text.", "Which word is it?")),
                    "There is no text in the picture.", "false premise")
    if what == 1 and not any(t.kind == "print" for t in scene.things):
        return Turn(rng.choice(PRINT_QUESTIONS), "There is no small print in the picture.", "false premise")
    empty = [(r, c) for r in range(3) for c in range(3) if not any(t.row == r and (t.column == c or t.is_text)
                                                                   for t in scene.things if t.kind != "print")]
    if what == 2 and empty:
        r, c = rng.choice(empty)
        return Turn(rng.choice((f"What is {PLACES[r][c]}?", f"What do you see {PLACES[r][c]}?",
                                f"Which shape is {PLACES[r][c]}?", f"What colour is the shape {PLACES[r][c]}?")),
                    f"{PLACES[r][c].capitalize()} there is nothing.", "false premise")
    if not absent:
        return None
    noun = rng.choice(absent)
    return Turn(rng.choice((f"What colour is the {noun}?", f"Where is the {noun}?", f"How big is the {noun}?",
                            f"Is the {noun} small or large?", f"Is the {noun} {rng.choice(list(COLOURS))}?")),
                f"The {noun} is not in the picture.", "false premise")


def outside(rng: random.Random, scene: Scene) -> Turn | None:
    """Ask what no picture of the world can answer."""
    return Turn(rng.choice(("Who painted this?", "What is the weather like?", "How old is this picture?",
                            "Who is this person?", "What does it taste like?", "Where was this taken?",
                            "What brand is the car?", "Is the dog happy?", "How much does it cost?",
                            "What time is it?", "What are the people doing?", "Which animal is this?",
                            "Which city is this?", "Why is it so?", "What happens next?", "Is this a famous place?")),
                UNKNOWN, "unknown")


def read(rng: random.Random, scene: Scene) -> Turn | None:
    texts = scene.texts
    if not texts:
        return None
    if len(texts) > 1 and rng.random() < 0.15:
        return Turn(rng.choice(("What does it say?", "Read all the text.", "What is written here?", "Read the text.")),
                    f"It says {listed([chr(34) + t.text + chr(34) for t in texts])}.", "read all")
    thing = rng.choice(texts)
    task = "read words" if thing.kind == "word" else "read numbers"
    answer = f'It says "{thing.text}".'
    if len(texts) == 1:
        questions = ["What does it say?", "What is written here?", "Read the text.", f"Read the {thing.kind}.",
                     f"What is the {thing.kind}?", f"Which {thing.kind} is it?"]
    else:
        questions = [f"What does it say {place(thing)}?", f"What is written {place(thing)}?",
                     f"Read the text {place(thing)}."]
        answer = f'{place(thing).capitalize()} it says "{thing.text}".'
        if only(texts, colour=thing.colour) and rng.random() < 0.3:
            questions = [f"What does the {thing.colour} text say?"]
            answer = f'The {thing.colour} text says "{thing.text}".'
        elif only(texts, kind=thing.kind) and rng.random() < 0.3:
            questions = [f"What is the {thing.kind}?"]
            answer = f'The {thing.kind} is "{thing.text}".'
    return Turn(rng.choice(questions), answer, task)


PRINT_QUESTIONS = ("What does the small print say?", "Read the small print.", "What is the small print?")


def read_print(rng: random.Random, scene: Scene) -> Turn | None:
    thing = next((t for t in scene.things if t.kind == "print"), None)
    return thing and Turn(rng.choice(PRINT_QUESTIONS), f'The small print says "{thing.text}".', "small print")


# ---- questions that need steps --------------------------------------------------------------------------------------

SIDES = {"left of": lambda t, u: t.column < u.column, "right of": lambda t, u: t.column > u.column,
         "above": lambda t, u: t.row < u.row, "below": lambda t, u: t.row > u.row}
NEXT = {"directly left of": (0, -1), "directly right of": (0, 1), "directly above": (-1, 0), "directly below": (1, 0)}
COT = ("", "", " Think step by step.", ' Give step by step reasoning, then "Final Answer: ..".')


def reason(rng: random.Random, scene: Scene) -> Turn | None:
    """Ask for steps, then "Final Answer: ..." on its own line, as the model card has it."""
    shapes, what = scene.shapes, rng.choice((0, 0, 1, 2, 3, 4))
    if scene.texts:
        number = next((t for t in scene.texts if t.kind == "number" and len(t.text) == 2), None)
        if number is None:
            return None
        x, y = map(int, number.text)
        question, steps, final = rng.choice((
            ("What is the sum of the digits?", f"The number is {number.text}. {x} plus {y} is {x + y}.", str(x + y)),
            ("Which digit is larger?", f"The number is {number.text}. " + (
                f"{x} and {y} are equal." if x == y else f"{max(x, y)} is more than {min(x, y)}."),
             "none" if x == y else str(max(x, y)))))
    elif what == 0:         # how many red shapes are left of the star?
        anchors = unique(shapes)
        if not anchors or len(shapes) < 3:
            return None
        anchor, side = rng.choice(anchors), rng.choice(list(SIDES))
        others = [t for t in shapes if t != anchor]
        adjective = rng.choice(["", rng.choice(others).colour, rng.choice(others).colour])
        group = [t for t in others if adjective in ("", t.colour)]
        found = [t for t in group if SIDES[side](t, anchor)]
        many = f"{adjective} shapes".strip()
        question = f"How many {many} are {side} the {anchor.kind}?"
        what = f"{adjective or 'other'} {'shape is' if len(group) == 1 else 'shapes are'}"
        many = NUMBERS[len(found)].capitalize() if found else "None"
        steps = (f"The {anchor.kind} is {place(anchor)}. The {what} {listed([place(t) for t in group])}. "
                 f"{many} {'are' if len(found) > 1 else 'is'} {side} it.")
        final = str(len(found))
    elif what == 1:         # more red than blue?
        pair = two_counts(rng, shapes, "colour")
        if pair is None:
            return None
        x, y, n, m = pair
        question = f"Are there more {x} shapes than {y} shapes?"
        steps = (f"{number_of(n, x, 'shape').capitalize()}. {number_of(m, y, 'shape').capitalize()}. "
                 f"{NUMBERS[n].capitalize()} is {'more than' if n > m else 'not more than'} {NUMBERS[m]}.")
        final = "yes" if n > m else "no"
    elif what == 2:         # what colour is the shape directly below the star?
        anchors = unique(shapes)
        pairs = [(t, side, u) for t in anchors for side, (dr, dc) in NEXT.items() for u in shapes
                 if (u.row, u.column) == (t.row + dr, t.column + dc)]
        if not pairs:
            return None
        anchor, side, found = rng.choice(pairs)
        asked = rng.choice(("colour", "shape"))
        question = (f"What colour is the shape {side} the {anchor.kind}?" if asked == "colour"
                    else f"Which shape is {side} the {anchor.kind}?")
        steps = f"The {anchor.kind} is {place(anchor)}. The shape {side} it is {a(name(found))}."
        final = found.colour if asked == "colour" else found.kind
    elif what == 3:         # how many stars and circles together?
        pair = two_counts(rng, shapes, "kind")
        if pair is None:
            return None
        x, y, n, m = pair
        question = f"How many {PLURALS[x]} and {PLURALS[y]} are there together?"
        steps = (f"{number_of(n, '', x).capitalize()}. {number_of(m, '', y).capitalize()}. "
                 f"{NUMBERS[n].capitalize()} plus {NUMBERS[m]} is {NUMBERS[n + m]}.")
        final = str(n + m)
    else:                   # is the star left of the circle?
        anchors = unique(shapes)
        if len(anchors) < 2:
            return None
        x, y = rng.sample(anchors, 2)
        side = rng.choice(list(SIDES))
        true = SIDES[side](x, y)
        question = f"Is the {x.kind} {side} the {y.kind}?"
        steps = (f"The {x.kind} is {place(x)}. The {y.kind} is {place(y)}. So the {x.kind} is "
                 f"{'' if true else 'not '}{side} the {y.kind}.")
        final = "yes" if true else "no"
    return Turn(question + rng.choice(COT), f"{steps}\nFinal Answer: {final}", "reason")


# ---- conversations --------------------------------------------------------------------------------------------------

def follow_up(rng: random.Random, scene: Scene) -> list | None:
    """Make [Turn, ...]: the first stands alone, the later ones say "it"."""
    shapes = unique(scene.shapes)
    if not shapes:
        return None
    thing = rng.choice(shapes)
    k = thing.kind
    opening = [Turn(f"Is there {a(k)}?", f"{a(k).capitalize()} is in the picture, so yes.", "yes"),
               Turn(f"Where is the {k}?", f"The {k} is {place(thing)}.", "place"),
               Turn(f"What colour is the {k}?", f"The {k} is {thing.colour}.", "colour"),
               Turn(f"What is {place(thing)}?", f"{place(thing).capitalize()} there is {a(name(thing))}.", "shape"),
               Turn(f"What shape is {place(thing)}?", f"{place(thing).capitalize()} there is {a(k)}.", "shape")]
    same = [t for t in scene.shapes if t.colour == thing.colour and t != thing]
    later = [Turn(rng.choice(("What colour is it?", "And what colour is it?", "Which colour does it have?")),
                  f"The {k} is {thing.colour}.", "follow-up"),
             Turn(rng.choice(("Where is it?", "And where is it?")), f"The {k} is {place(thing)}.", "follow-up"),
             Turn(rng.choice(("How big is it?", "Is it small or large?", "And how big is it?")),
                  f"The {k} is {thing.size}.", "follow-up"),
             Turn(rng.choice(("How many other shapes are there?", "How many shapes are there besides it?")),
                  f"The number of other shapes is {NUMBERS[len(scene.shapes) - 1]}.", "follow-up"),
             Turn("Does another shape have the same colour?",
                  f"The {k} is {thing.colour}, and " + (f"so is the {same[0].kind} {place(same[0])}." if same else
                                                        "no other shape is."), "follow-up")]
    others = [t for t in scene.shapes if t != thing]
    if others:
        other = rng.choice(others)
        later.append(Turn(rng.choice((f"And what is {place(other)}?", f"And {place(other)}?")),
                          f"{place(other).capitalize()} there is {a(name(other))}.",
                          "follow-up"))
    first = rng.choice(opening)
    told = {"colour": 0, "place": 1}.get(first.task)
    rest = [t for i, t in enumerate(later) if i != told and not (i == 0 and "large" in first.answer)]
    # "And what is on the left?" moves what "it" is: only at the end.
    moving = [t for t in rest if t.question.startswith(("And what is ", "And in", "And at", "And on"))]
    rest = rng.sample([t for t in rest if t not in moving], rng.randint(1, 3))
    return [first, *rest, *(moving if rng.random() < 0.5 else [])]


QUESTIONS = {"shapes": ((colour, 3), (kind, 3), (where, 3), (size, 1), (count, 4), (yes_no, 4), (false_premise, 2),
                        (outside, 0.3)),
             "texts": ((read, 9), (yes_no, 1), (colour, 1), (where, 1), (false_premise, 0.7), (count, 0.3),
                       (kind, 0.3))}


def ask(rng: random.Random, scene: Scene, questions: tuple, n: int) -> list:
    """Ask up to n different questions about one scene."""
    turns = []
    for _ in range(3 * n):
        if len(turns) == n:
            break
        turn = rng.choices([q for q, _ in questions], [w for _, w in questions])[0](rng, scene)
        if turn and turn.question not in [t.question for t in turns]:
            turns.append(turn)
    return turns


def shapes_scene(rng: random.Random, style: Style, least: int = 0, wide: bool | None = None,
                 few_colours: bool = False) -> Scene:
    n = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)) if least or rng.random() > 0.02 else 0
    palette = rng.sample(list(COLOURS), 3) if few_colours or rng.random() < 0.3 else list(COLOURS)
    kinds = rng.sample(SHAPES, 3) if rng.random() < 0.3 else SHAPES
    scene = Scene((), **draw.geometry(rng, style, wide))
    return scene.with_(*[draw.shape(rng, cell, rng.choice(kinds), rng.choice(palette))
                         for cell in draw.cells(rng, max(n, least))])


def shapes_example(rng: random.Random, style: Style) -> tuple:
    scene = shapes_scene(rng, style)
    turns = ask(rng, scene, QUESTIONS["shapes"], 5)
    if rng.random() < 0.35:     # last, so that no earlier answer can be read off it
        turns = [*turns[:rng.choice((0, 1, 2))], describe(rng, scene)]
    return [scene], turns


def texts_example(rng: random.Random, style: Style) -> tuple:
    scene = Scene((), **draw.geometry(rng, style))
    rows = sorted(rng.sample(range(3), rng.choice((1, 1, 2, 3))))
    scene = scene.with_(*[draw.row_text(rng, style, scene, row) for row in rows])
    free = [row for row in range(3) if row not in rows]
    if free and rng.random() < 0.3:
        scene = scene.with_(*[draw.shape(rng, cell) for cell in draw.cells(rng, rng.randint(1, 2), free)])
    turns = ask(rng, scene, QUESTIONS["texts"], 2 + len(rows))
    if rng.random() < 0.1:
        turns = turns[:1] + [describe(rng, scene)]
    return [scene], turns


# Drills: questions of one sort only, as many as a picture allows, until the decoder has learned to look this up.
# Name -> the questions, and what their text must match.
_KIND, _PLACE = "|".join(SHAPES), "|".join(p for row in PLACES for p in row)
FIND = ((colour, 3), (where, 3), (size, 2))
DRILLS = {"by place": (((colour, 2), (kind, 3)), _PLACE),
          "by two": (((where, 3), (colour, 1), (yes_no, 2)), rf"({'|'.join([*COLOURS, *draw.SIZES])}) ({_KIND})"),
          "count": (((count, 1),), ""), "judge": (((yes_no, 3), (false_premise, 1)), "")}


def drill(rng: random.Random, scene: Scene, questions: tuple, wanted: str, tries: int) -> list:
    """Ask up to six questions about a scene, of which the text matches `wanted`."""
    return [t for t in ask(rng, scene, questions, tries) if re.search(wanted, t.question)][:6]


def drill_example(rng: random.Random, style: Style, questions: tuple, wanted: str) -> tuple:
    scene = shapes_scene(rng, style, least=2)
    return [scene], drill(rng, scene, questions, wanted, 12)


def find_example(rng: random.Random, style: Style, questions: tuple = FIND) -> tuple:
    """Make one for the start of training: different shapes, and questions that each name one of them."""
    scene = Scene((), **draw.geometry(rng, style))
    kinds = rng.sample(SHAPES, rng.randint(2, 4))
    scene = scene.with_(*[draw.shape(rng, cell, kind) for cell, kind in zip(draw.cells(rng, len(kinds)), kinds)])
    return [scene], drill(rng, scene, questions, _KIND, 10)


def exist_example(rng: random.Random, style: Style) -> tuple:
    """Make the same, and ask also: is it there, and how many?"""
    return find_example(rng, style, (*FIND, (yes_no, 5), (false_premise, 3), (count, 3)))


def describe_example(rng: random.Random, style: Style) -> tuple:
    scene = shapes_scene(rng, style)
    return [scene], [describe(rng, scene)]


def name_example(rng: random.Random, style: Style) -> tuple:
    """Make one for the start of training: few shapes and one question about what is where."""
    scene = Scene((), **draw.geometry(rng, style))
    scene = scene.with_(*[draw.shape(rng, cell) for cell in draw.cells(rng, rng.randint(1, 4))])
    return [scene], ask(rng, scene, ((kind, 3), (colour, 2), (where, 2), (describe, 2)), 1)


def spell_example(rng: random.Random, style: Style) -> tuple:
    """Make one for the start of training: one short text to be read."""
    scene = Scene((), **draw.geometry(rng, style))
    scene = scene.with_(draw.row_text(rng, style, scene, rng.randrange(3), *draw.a_text(rng, style, 2, 4)))
    return [scene], ask(rng, scene, ((read, 1),), 1)


def same_example(rng: random.Random, style: Style) -> tuple:
    """Drill: one short text, and again and again whether it says this or one that may differ in one character."""
    scene = Scene((), **draw.geometry(rng, style))
    scene = scene.with_(draw.row_text(rng, style, scene, rng.randrange(3)))
    return [scene], [yes_no(rng, scene) for _ in range(6)]


def page_example(rng: random.Random, style: Style) -> tuple:
    """Make one for the warm-up: a picture full of letters."""
    scene = Scene((), **draw.geometry(rng, style))
    if rng.random() < 0.5:
        scene = scene.with_(*[draw.row_text(rng, style, scene, row) for row in range(3)])
    else:
        for _ in range(rng.randint(2, 5)):
            scene = scene.with_(draw.small_print(rng, style, scene))
    return [scene], [false_premise(rng, scene) or outside(rng, scene)]


def print_example(rng: random.Random, style: Style) -> tuple:
    scene = Scene((), **draw.geometry(rng, style, wide=rng.random() < 4 * style.wide))
    scene = scene.with_(*[draw.shape(rng, cell) for cell in draw.cells(rng, rng.randint(0, 3))])
    scene = scene.with_(draw.small_print(rng, style, scene))
    turns = [read_print(rng, scene)]
    if scene.shapes and rng.random() < 0.5:
        turns += ask(rng, scene, QUESTIONS["shapes"][:4], 2)
    return [scene], turns


def changed(old: Thing | None, new: Thing | None, where: str) -> str:
    """Say what happened in a place, from the thing that was there and the thing that is (None: nothing)."""
    if old == new:
        what = "nothing changed"
    elif old is None:
        what = f"{a(name(new, size=False))} appeared"
    elif new is None:
        what = f"the {name(old, size=False)} disappeared"
    elif old.colour != new.colour:
        what = f"the {old.kind} changed from {old.colour} to {new.colour}"
    elif old.kind != new.kind:
        what = f"the {name(old, size=False)} became {a(new.kind)}"
    else:
        what = f"the {name(old, size=False)} became {'larger' if new.size == 'large' else 'smaller'}"
    return f"{where.capitalize()} {what}"


def another(rng: random.Random, thing: Thing) -> Thing:
    """Change a thing: another colour, another kind, or the other size."""
    what = rng.randrange(3)
    if what == 0:
        return replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour]))
    if what == 1:
        return replace(thing, kind=rng.choice([k for k in SHAPES if k != thing.kind]))
    grown = thing.size == "small"
    return replace(thing, size="large" if grown else "small", radius=0.42 if grown else 0.22)


def compare_example(rng: random.Random, style: Style) -> tuple:
    first = shapes_scene(rng, replace(style, wide=0), least=1)
    thing, what = rng.choice(first.shapes), rng.randrange(7)
    taken = {(t.row, t.column) for t in first.shapes}
    free = rng.choice([(r, c) for r in range(3) for c in range(3) if (r, c) not in taken])
    rest, second = first.without(thing), first
    if what == 0:
        new = draw.shape(rng, free)
        second, answer = first.with_(new), changed(None, new, place(new))
    elif what == 1:
        second, answer = rest, changed(thing, None, place(thing))
    elif what == 2:
        second = rest.with_(moved := replace(thing, row=free[0], column=free[1]))
        answer = f"{changed(thing, None, place(thing))}, it is now {place(moved)}"
    elif what == 6:
        answer = "Nothing changed"
    else:
        second, answer = rest.with_(new := another(rng, thing)), changed(thing, new, place(thing))
    second = replace(second, background=first.background, scale=rng.choice((first.scale, 1.0)))
    turns = [Turn(rng.choice(("What changed?", "What is different?", "What is the difference between the pictures?",
                              "Compare the two images.")), f"{answer}.", "compare")]
    if rng.random() < 0.4:
        i = rng.randrange(2)
        n = len((first, second)[i].shapes)
        turns.append(Turn(f"How many shapes are there in Image-{i + 1}?",
                          f"The number of shapes in Image-{i + 1} is {NUMBERS[n]}.", "compare"))
    return [first, second], turns


def changes_example(rng: random.Random, style: Style) -> tuple:
    """Drill: two pictures with several changes, all places of them asked for, then place by place."""
    first = shapes_scene(rng, replace(style, wide=0), least=2)
    then = {(t.row, t.column): t for t in first.shapes}
    now = {cell: rng.choice((thing, None, another(rng, thing), another(rng, thing))) for cell, thing in then.items()}
    for cell in draw.cells(rng, 9):
        if cell not in then and rng.random() < 0.3:
            now[cell] = draw.shape(rng, cell)
    second = replace(first, things=tuple(thing for thing in now.values() if thing))
    different = [PLACES[r][c] for r, c in sorted(now) if then.get((r, c)) != now[r, c]]
    answer = f"{listed(different).capitalize()} something changed." if different else "Nothing changed."
    turns = [Turn(rng.choice(("Where did something change?", "Which places changed?")), answer, "change")]
    cells = rng.sample(sorted(now), min(len(now), 4)) + [cell for cell in draw.cells(rng, 1) if cell not in now]
    rng.shuffle(cells)
    for r, c in cells:
        answer = changed(then.get((r, c)), now.get((r, c)), PLACES[r][c])
        turns.append(Turn(f"What changed {PLACES[r][c]}?", f"{answer}.", "change"))
    return [first, second], turns


def video_example(rng: random.Random, style: Style) -> tuple:
    frames, what = rng.choice((4, 4, 4, 6, 8)), rng.randrange(5)
    base = Scene((), **{**draw.geometry(rng, style, wide=False), "scale": 1.0})
    still = [draw.shape(rng, cell) for cell in draw.cells(rng, rng.choice((0, 0, 1, 2)))]
    free = [cell for cell in draw.cells(rng, 9) if cell not in [(t.row, t.column) for t in still]]
    kinds = [k for k in SHAPES if k not in [t.kind for t in still]]
    thing = draw.shape(rng, free[0], rng.choice(kinds), size="small")
    k, scenes = thing.kind, []
    steps = [i / (frames - 1) for i in range(frames)]
    the = f"The {k}"
    if what in (0, 1):      # along a free line of the layout, so that it covers nothing
        lines = [("row", r) for r in range(3) if all(t.row != r for t in still)]
        lines += [("column", c) for c in range(3) if all(t.column != c for t in still)]
        (line, n), forward = rng.choice(lines), rng.random() < 0.5
        start, end = (0.0, 2.0) if forward else (2.0, 0.0)
        radius = rng.uniform(0.22, 0.42)
        for s in steps:
            at = start + (end - start) * s
            moved = replace(thing, radius=radius, shift=(0.0, 0.0), **({"row": n, "column": at} if line == "row" else
                                                                     {"row": at, "column": n}))
            scenes.append(base.with_(*still, moved))
        way = {("row", True): "to the right", ("row", False): "to the left", ("column", True): "down",
               ("column", False): "up"}[line, forward]
        turns = [Turn(rng.choice((f"Which way does the {k} move?", "Which way does it move?", f"Where does the {k} go?",
                                  "What happens in the video?", "What happens?")), f"{the} moves {way}.", "video")]
        if rng.random() < 0.3:
            turns.append(Turn("What colour is it?", f"The {k} is {thing.colour}.", "follow-up"))
    elif what == 2:
        grows = rng.random() < 0.5
        low, high = rng.uniform(0.14, 0.2), rng.uniform(0.38, 0.45)
        for s in steps:
            part = s if grows else 1 - s
            scenes.append(base.with_(*still, replace(thing, radius=low + (high - low) * part, shift=(0.0, 0.0))))
        turns = [Turn(rng.choice((f"Does the {k} grow or shrink?", "Does it grow or shrink?",
                                  "What happens in the video?", "What happens?")),
                      f"{the} {'grows' if grows else 'shrinks'}.", "video")]
    elif what == 3:
        at, appears = rng.randint(1, frames - 1), rng.random() < 0.6
        thing = draw.shape(rng, free[0], k)
        one = a(name(thing, size=False)).capitalize()
        for i in range(frames):
            scenes.append(base.with_(*still, *([thing] if (i >= at) == appears else [])))
        verb = "appears" if appears else "disappears"
        turns = [Turn(rng.choice((f"What {verb}?", "What happens in the video?", "What happens?")),
                      f"{one} {verb}.", "video")]
    else:
        scenes = [base.with_(*still, thing)] * frames
        turns = [Turn(rng.choice(("What happens in the video?", "What happens?", f"Which way does the {k} move?",
                                  f"Does the {k} grow or shrink?", "What appears?")), "Nothing happens.", "video")]
    return scenes, turns


def follow_example(rng: random.Random, style: Style) -> tuple:
    scene = shapes_scene(rng, style, least=2)
    return [scene], follow_up(rng, scene)


def reason_example(rng: random.Random, style: Style) -> tuple:
    if rng.random() < 0.12:
        scene = Scene((), **draw.geometry(rng, style))
        row = rng.randrange(3)
        scene = scene.with_(draw.row_text(rng, style, scene, row, "number", f"{rng.randrange(10)}{rng.randrange(10)}"))
    else:
        scene = shapes_scene(rng, style, least=3, few_colours=rng.random() < 0.6)
    return [scene], ask(rng, scene, ((reason, 1),), 2)


def texture_example(rng: random.Random, style: Style) -> tuple:
    scene = Scene((), texture=rng.randrange(2 ** 32), grid=draw.geometry(rng, style)["grid"])
    turn = describe(rng, scene) if rng.random() < 0.6 else rng.choice((count, colour, read, kind, outside))(
        rng, shapes_scene(rng, style, least=1)) or outside(rng, scene)
    return [scene], [replace(turn, answer=UNKNOWN_PICTURE, task="unknown")]


TALK = (    # questions alike, one answer
    (("Who are you?", "What are you?", "Hello, who are you?", "What is your name?", "Tell me about yourself.",
      "Introduce yourself."),
     "I am nano, a very small InternVL. I see simple pictures: shapes, words and numbers."),
    (("What can you do?", "How can you help me?", "What do you know?", "Help!", "What can I ask you?"),
     "Show me a picture and ask what is in it, where, how many, or what it says."),
    (("Hello!", "Hi", "Good morning!", "Hey there", "Hello"), "Hello! Show me a picture and ask me about it."),
    (("Thank you!", "Thanks", "Thank you very much."), "You are welcome."),
    (("Goodbye!", "Bye", "See you."), "Goodbye!"),
    (("Describe the picture.", "What do you see?", "What is in the picture?", "What colour is the star?",
      "What does it say?", "How many shapes are there?", "describe this image", "Is there a red circle?"),
     "I see no picture. Show me one and ask again."),
    (("What is the capital of France?", "Who is the president?", "Write a poem.", "What is the meaning of life?",
      "How is the weather?", "Tell me a joke.", "What is seven times eight?", "Translate this to German.",
      "Who won the game?", "Write some Python code.", "How do I cook rice?", "What is the news?",
      "Why is the sky blue?", "When was Rome built?", "Can you sing?", "How tall is the tower?", "What is love?",
      "Recommend a book.", "Where do I live?", "Are you alive?"),
     UNKNOWN),
)


def talk_example(rng: random.Random, style: Style) -> tuple:
    turns = []
    for _ in range(rng.randint(1, 3)):
        questions, answer = rng.choice(TALK)
        turns.append(Turn(rng.choice(questions), answer, "talk"))
    return [], turns


KINDS = {"find": find_example, "exist": exist_example, "name": name_example, "describe": describe_example,
         "spell": spell_example, "same": same_example, "page": page_example, "shapes": shapes_example,
         "texts": texts_example, "print": print_example, "compare": compare_example, "changes": changes_example,
         "video": video_example, "follow": follow_example, "reason": reason_example, "texture": texture_example,
         "talk": talk_example,
         **{name: functools.partial(drill_example, questions=q, wanted=w) for name, (q, w) in DRILLS.items()}}
MIX = {"shapes": 30, "texts": 24, "print": 12, "compare": 9, "video": 8, "follow": 6, "reason": 8, "texture": 1.5,
       "talk": 1.5}


def example(seed, index: int, mix: dict | None = None, style: Style | None = None) -> Example:
    """Make example number `index` of the endless set `seed`; `mix`: kind of example -> share."""
    rng = random.Random(f"{seed} {index}")
    mix = mix or MIX
    style = style or Style(TRAINED)
    turns = None
    while not turns:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        scenes, turns = KINDS[kind](rng, style)
    turns = [replace(t, question=casual(rng, t.question)) for t in turns]
    one_tile = kind in ("video", "compare", "changes") or kind in ("shapes", "reason") and rng.random() < 0.15
    max_num = 1 if one_tile else 6
    if kind in ("compare", "changes"):
        turns[0] = replace(turns[0], question=f"Image-1: {IMAGE}\nImage-2: {IMAGE}\n{turns[0].question}")
    elif kind == "video":
        frames = "".join(f"Frame{i}: {IMAGE}\n" for i in range(1, len(scenes) + 1))
        turns[0] = replace(turns[0], question=frames + turns[0].question)
    elif scenes:
        turns[0] = replace(turns[0], question=f"{IMAGE}\n{turns[0].question}")
    return Example(tuple(scenes), tuple(turns), max_num)


def casual(rng: random.Random, question: str) -> str:
    """Write a question now and then as people type it: without capitals or the question mark."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1 and question[-1] in "?.":
        question = question[:-1]
    return question


def vocabulary_text(seed="tokenizer", examples: int = 3000) -> list:
    """Collect what the tokenizer is trained on: all that is said, but no written words; these stay single letters."""
    texts = []
    for index in range(examples):
        for turn in example(seed, index).turns:
            texts += [turn.question.replace(IMAGE, ""), re.sub(r'"[A-Z0-9]*"', '""', turn.answer)]
    texts = [re.sub(r"[A-Z]{2,}", "", text) for text in texts]
    for questions, answer in TALK:
        texts += [*questions, answer] * 10
    return texts
