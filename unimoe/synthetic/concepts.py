"""The concepts that synthetic images show: emoji of one code point each, with a name and a group.

The list was selected from contact sheets of OpenMoji: drawings that are recognisable at 100 pixels. HELD_OUT
concepts never occur in training or validation images.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    char: str
    """The emoji, a single code point."""
    name: str
    """One or two words in lower case, without an article."""
    group: str
    """One of GROUPS, or of the further groups of :mod:`unimoe.synthetic.more_concepts`."""

    @property
    def phrase(self) -> str:
        """The name with its article, if it takes one: "a dog", "an owl", "broccoli"."""
        return with_article(self.name)


GROUPS = {
    "animal": "An animal.",
    "food": "Food.",
    "plant": "A plant.",
    "vehicle": "A vehicle.",
    "object": "An object.",
}
"""Group -> answer to "What kind of thing is it?"."""

_UNCOUNTED = frozenset({"broccoli", "corn", "cheese", "pizza", "scissors"})

_TABLE = {
    "animal": "🐶dog 🐱cat 🐰rabbit 🦊fox 🐻bear 🐼panda 🐨koala 🐯tiger 🦁lion "
    "🐮cow 🐷pig 🐸frog 🐵monkey 🐧penguin "
    "🦆duck 🦉owl 🐴horse 🐝bee 🦋butterfly 🐌snail 🐞ladybug 🐙octopus 🦀crab "
    "🐘elephant 🦒giraffe 🦓zebra",
    "food": "🍎apple 🍐pear 🍋lemon 🍌banana 🍉watermelon 🍓strawberry "
    "🍍pineapple 🍅tomato 🍆eggplant 🥑avocado "
    "🥦broccoli "
    "🌽corn 🥕carrot 🥨pretzel 🧀cheese 🍔hamburger 🍕pizza 🌭hot_dog 🍩doughnut 🍄mushroom",
    "plant": "🌵cactus 🌴palm_tree 🌻sunflower 🌹rose",
    "vehicle": "🚗car 🚌bus 🚑ambulance 🚜tractor 🚲bicycle 🚂train ✈airplane "
    "🚀rocket 🚁helicopter ⛵sailboat",
    "object": "⚽soccer_ball 🏀basketball 🎸guitar 🎻violin 📷camera 🔑key "
    "✂scissors ☂umbrella 🎁gift 👑crown "
    "⏰alarm_clock "
    "🌈rainbow ⛄snowman 🤖robot",
}
_HELD_OUT_TABLE = {
    "animal": "🐬dolphin 🐢turtle 🦩flamingo",
    "food": "🍑peach 🥝kiwi 🥒cucumber 🍪cookie",
    "plant": "🌷tulip",
    "vehicle": "🚕taxi",
    "object": "🎺trumpet 🎈balloon 🏆trophy",
}


def with_article(name: str) -> str:
    """ "a dog" for "dog"; uncountable names get no article."""
    if name in _UNCOUNTED:
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _read(table: dict[str, str]) -> tuple[Concept, ...]:
    return tuple(
        Concept(entry[0], entry[1:].replace("_", " "), group)
        for group, line in table.items()
        for entry in line.split()
    )


TRAINED: tuple[Concept, ...] = _read(_TABLE)
"""The 74 concepts of training images."""
HELD_OUT: tuple[Concept, ...] = _read(_HELD_OUT_TABLE)
"""The 12 concepts of held-out tests only."""
BY_NAME: dict[str, Concept] = {concept.name: concept for concept in TRAINED + HELD_OUT}
