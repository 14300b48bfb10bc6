"""Ordinary text without end: a seeded grammar of small stories, or a file of one's own."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sparse_serve_jax import files

# A source of text: sentence after sentence, each with the space or, where a paragraph begins, the newline before it.
Text = Callable[[np.random.Generator], Iterator[str]]


def sentences(rng: np.random.Generator) -> Iterator[str]:
  """Yields sentences of a story without end, in the form of `Text`.

  A cast of eight people comes back from paragraph to paragraph, each with a town, a trade and a thing of their own; in
  half of the paragraphs a newcomer replaces somebody. Numbers stay below 2,100. The words of a class are drawn with the
  first of its list the most often: the first share x of the list makes up sqrt(x) of the text.
  """
  fresh = {name: _draws(rng, words) for name, words in _CLASSES.items()}
  names = rounds(rng, NAMES)  # so that no two of the cast are called the same
  forms = {name: rounds(rng, templates) for name, templates in _FORMS.items()}

  def newcomer() -> dict[str, str]:
    return {"": next(names)} | {f"_{of}": next(fresh[of]) for of in ("town", "job", "thing")}

  cast = [newcomer() for _ in range(8)]
  kinds = _draws(rng, list(_FORMS))
  for pick, newest, size in _triples(rng):
    if newest < len(cast):
      cast[newest] = newcomer()
    a, b = cast[pick % 8], cast[(pick + 1 + pick // 8 % 7) % 8]
    scene = {"A" + of: word for of, word in a.items()} | {"B" + of: word for of, word in b.items()}
    scene |= {"P": next(fresh["place"]), "O": next(fresh["noun"])}
    kind, before = next(kinds), "\n"
    for form, slots in itertools.islice(forms[kind], size):
      yield before + form % tuple([scene[slot] if slot in scene else next(fresh[slot]) for slot in slots])
      before = " "


def document(rng: np.random.Generator, n_words: int, text: Text = sentences) -> str:
  """Returns whole sentences of a text, at least n_words words in all and no sentence more than that needs."""
  taken = []
  for sentence in text(rng) if n_words > 0 else ():
    taken.append(sentence)
    n_words -= sentence.count(" ") + (sentence[0] == "\n")
    if n_words <= 0:
      break
  return "".join(taken)[1:]


def user_text(*paths: str | pathlib.Path) -> Text:
  """The sentences of UTF-8 files, one after the other, from a random one on and round again at the end of the last.

  Blank lines part paragraphs; other line breaks are spaces. A sentence ends after a word that ends in one of .!? or has
  39 words before it, so that a unit stays small where there is no punctuation.

  Raises:
    ValueError: a file is missing or not UTF-8, or they have no words.
  """
  units: list[str] = []
  for paragraph in (of for file in paths for of in re.split(r"\n\s*\n", files.read_text(file))):
    words, start = paragraph.split(), 0
    for i, word in enumerate(words, 1):
      if word[-1] in ".!?" or i - start == 40 or i == len(words):
        units.append(("\n" if start == 0 else " ") + " ".join(words[start:i]))
        start = i
  if not units:
    raise ValueError(f"{', '.join(map(str, paths))} has no words")

  def text(rng: np.random.Generator) -> Iterator[str]:
    first = int(rng.integers(len(units)))
    return (units[i % len(units)] for i in itertools.count(first))

  return text


def rounds(rng: np.random.Generator, items: list) -> Iterator:
  """Yields all items in a random order, then all of them in another, without end."""
  while True:
    for i in rng.permutation(len(items)).tolist():
      yield items[i]


def _draws(rng: np.random.Generator, words: list) -> Iterator:
  while True:
    for i in (len(words) * rng.random(256) ** 2).astype(int).tolist():
      yield words[i]


def _triples(rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
  """Yields who is in a paragraph (0 to 55), the newcomer's place (8 and more: none) and the number of sentences."""
  while True:
    yield from zip(*(rng.integers(low, high, 64).tolist() for low, high in ((0, 56), (0, 16), (3, 9))), strict=True)


def _plural(noun: str) -> str:
  if noun.endswith("y") and noun[-2] not in "aeiou":
    return noun[:-1] + "ies"
  return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _past(verb: str) -> str:
  if verb.endswith("y") and verb[-2] not in "aeiou":
    return verb[:-1] + "ied"
  return verb + ("d" if verb.endswith("e") else "ed")


def _article(word: str) -> str:
  return ("an " if word[0] in "aeiou" else "a ") + word


# Lists begin with the words that are to come most often. Nouns, verbs and adjectives are regular: the forms are made.
NOUNS = """
book house door table chair window lamp letter box key cup plate road tree river stone bridge garden boat ship bell
clock ring coat hat bag basket bottle map picture song story word name number paper pen pencil page card flag drum horn
flute apple pear plum cherry grape lemon orange peach melon berry nut onion carrot bean pea turnip pumpkin mushroom
pepper egg cake pie biscuit cheese pudding sausage pancake sandwich bun roll cookie candle lantern torch mirror pillow
blanket carpet curtain towel broom bucket barrel crate chest drawer shelter bench stool desk bed cradle cupboard
wardrobe stove oven kettle pan pot jug bowl spoon fork tray jar lid cork hammer saw nail screw drill axe spade rake hoe
plough cart wagon wheel axle saddle bridle harness rope chain hook net anchor sail mast oar rudder paddle raft canoe
ferry barge train engine truck tractor van bus tram bicycle carriage sledge rocket plane glider kite balloon horse cow
goat pig hen rooster duck cat dog rabbit mule donkey camel pony lamb crow raven eagle hawk owl swan heron stork sparrow
robin finch magpie pigeon parrot peacock turkey pheasant gull falcon lark cuckoo wren bear fox badger otter beaver
squirrel hedgehog mole rat bat frog toad newt snake lizard turtle tortoise spider beetle ant bee wasp moth cricket snail
worm crab lobster shrimp whale dolphin shark seal trout eel carp pike herring oyster mussel tiger lion leopard panther
jaguar monkey gorilla elephant giraffe zebra antelope crocodile kangaroo koala penguin walrus flower rose tulip daisy
poppy violet lily orchid daffodil iris thistle nettle fern moss ivy reed rush weed seed root branch twig stem petal
thorn acorn cone log plank board beam post pole rod stick club spear sword shield helmet bow arrow cannon rifle trap
cage fence gate wall tower castle palace temple chapel cottage cabin hut barn stable mill workshop tunnel cellar attic
staircase ladder chimney balcony terrace fountain well pond lake stream harbor dam dock pier lighthouse beach bay island
cape reef cliff cave valley hill mountain peak ridge slope meadow field pasture orchard vineyard forest wood grove
jungle swamp desert dune plain moor glacier crater spring geyser path trail track lane street avenue square corner
crossing signal sign lever button switch handle knob latch lock hinge bolt gear pulley crank pump valve pipe hose tap
sink bath drain filter funnel ladle sieve grater mixer blender toaster fridge freezer heater fan radiator boiler furnace
lens telescope microscope camera compass thermometer barometer scale ruler needle thread zipper ribbon lace collar
sleeve pocket belt buckle glove sock shoe boot sandal slipper shawl cloak robe gown dress skirt shirt jacket sweater
vest apron uniform cap hood mask wig crown necklace bracelet brooch pearl diamond ruby emerald sapphire opal coin medal
badge stamp ticket token bill receipt check wallet purse suitcase trunk parcel package envelope postcard notebook diary
album atlas dictionary novel poem play chapter verse line sentence symbol figure chart diagram drawing sketch painting
portrait statue mosaic poster banner puzzle riddle game toy doll puppet marble top ball racket skate ski sled surfboard
trophy prize gift present surprise secret promise plan idea thought dream wish hope question answer reason rule law
order lesson test exam class course school college library museum theatre cinema gallery circus market shop store bakery
tavern inn hotel restaurant kitchen parlor office bank factory mine quarry farm ranch stadium court prison hospital
clinic station airport village town city county kingdom empire nation border capital crowd team crew band choir
orchestra army fleet herd flock pack swarm tribe clan family brother sister cousin uncle aunt nephew niece friend
neighbor stranger guest host visitor traveler pilgrim guard soldier captain sailor pirate knight king queen prince duke
baron lord servant farmer shepherd hunter miller baker butcher cook waiter tailor weaver potter smith carpenter mason
plumber painter singer dancer actor poet writer editor printer teacher student pupil doctor nurse dentist lawyer judge
clerk banker merchant trader pilot driver porter gardener engineer chemist inventor explorer morning evening night day
week month year hour minute second season summer winter autumn holiday birthday festival wedding party parade feast
picnic dinner supper breakfast lunch snack meal soup stew salad sauce roast jelly cream syrup tea coffee cocoa juice
cloud storm shower breeze gale flood drought frost icicle rainbow sunrise sunset shadow star moon planet comet meteor
sky horizon wave tide current ripple splash bubble drop puddle mist flame spark ember coal brick tile slate pebble
boulder crystal metal wire spool magnet battery bulb cable plug socket motor machine tool device gadget robot computer
screen keyboard radio phone record speaker microphone piano violin cello guitar banjo harp trumpet trombone clarinet
organ whistle rattle gong melody rhythm chord note tune dance step jump race walk journey voyage trip tour visit route
detour mile yard inch pound ounce ton gallon pint dozen pair couple group row stack pile heap bundle bunch cluster layer
sheet slice piece scrap fragment crumb grain flake speck dot stripe circle triangle oval cube sphere cylinder
""".split()

ADJECTIVES = """
small old new large long red blue green white black little good big young early late warm cold quiet bright dark heavy
light round square flat narrow broad wide deep shallow high low short tall thick thin soft hard smooth rough sharp blunt
clean dirty dry wet damp empty full open closed hidden secret plain simple strange common rare famous local foreign
ancient modern brave calm clever kind gentle proud shy bold honest loyal patient polite eager curious careful careless
cheerful happy glad sad angry tired sleepy hungry thirsty lonely busy lazy idle quick slow swift sudden steady rapid
silent noisy loud faint clear cloudy foggy misty rainy snowy sunny stormy windy frosty icy muddy dusty sandy rocky
grassy leafy mossy wooden stone brass copper silver golden iron steel tin bronze leather woolen cotton silken velvet
paper glass crystal marble clay yellow orange purple pink brown grey crimson scarlet violet turquoise olive amber ivory
pale dim dull shiny glossy polished painted carved woven knitted folded bent curved straight crooked twisted broken
cracked torn worn faded rusty mended repaired patched stained spotted striped checkered feathered furry fuzzy hairy
woolly fluffy silky sticky slippery oily greasy salty sweet sour bitter spicy bland fresh stale ripe rotten raw roasted
baked boiled fried frozen melted sturdy solid hollow fragile delicate tender tough strong weak mighty feeble healthy
sick pure mixed whole half double single triple final first last next recent former future daily weekly monthly yearly
annual usual normal regular odd even equal similar different various certain precise exact vague obvious mysterious
magic enchanted haunted sacred holy royal noble humble modest grand splendid magnificent elegant graceful charming
lovely pretty handsome ugly ordinary fancy precious valuable costly cheap costless useful useless handy helpful harmless
dangerous risky safe secure private public rural urban coastal northern southern eastern western central distant nearby
remote inner outer upper lower middle front rear left right inland tropical polar wild tame domestic native alien lively
playful merry jolly friendly hostile cruel fierce savage wicked evil greedy selfish generous jealous nervous anxious
afraid fearless reckless daring heroic stubborn obedient rebellious wise foolish silly serious solemn earnest sincere
cunning sly crafty witty dreary gloomy murky shady hazy starry moonlit sunlit glowing gleaming sparkling flickering
burning smoking steaming freezing chilly cool mild hot humid arid fertile barren lush dense sparse crowded vacant spare
extra scarce ample plentiful abundant tiny giant huge vast immense slim slender plump stout lean bulky compact portable
movable fixed loose tight firm limp stiff elastic flexible rigid brittle jagged uneven level steep sloping vertical
horizontal upright tilted slanted pointed tapered oval circular spiral zigzag tangled knotted braided buttoned laced
tailored rusted tarnished gilded jeweled lacquered varnished waxed dyed bleached scented fragrant stinking musty smoky
peppery nutty creamy crunchy crispy chewy juicy watery frothy bubbly fizzy mellow vivid drab pastel neon opaque glazed
tinted silvery coppery ashen rosy ruddy tawny dappled speckled mottled marbled forked winged horned tusked bearded
crested hooded masked armored barefoot blind deaf mute lame nimble agile clumsy awkward weary drowsy alert awake asleep
restless peaceful serene tranquil hectic
""".split()

VERBS = """
open carry clean move turn watch help visit follow paint repair lift pack push pull touch use want need notice remember
mention describe explain show order borrow return collect gather count measure check test inspect examine study observe
admire praise like love miss enjoy protect guard cover uncover fold unfold load unload deliver receive accept refuse
offer promise demand request select pick arrange sort store save clear wash polish dust brush mend fix patch sew stitch
glue fasten loosen tighten unlock close crack smash destroy damage ruin wreck restore assemble construct create design
invent discover explore search sketch trace copy print sign stamp label mark color decorate varnish carve shape twist
stretch squeeze press crush roll toss launch chase hunt trail track guide direct steer pilot park haul raise lower hoist
suspend anchor moor attach connect join separate divide share trade exchange purchase sample taste smell season boil
roast toast peel slice mix pour fill empty drain soak rinse dry warm heat cool water plant harvest prune rake weed
plough cultivate fence bury unearth reveal display present thank greet welcome invite entertain amuse surprise startle
frighten warn threaten attack defend rescue capture release punish pardon accuse blame question answer contact signal
telephone remind train coach instruct advise support assist obey respect honor trust doubt suspect ignore avoid escape
approach enter pass cross climb reach circle surround block prevent delay finish start continue resume repeat practice
perform rehearse record announce report publish review approve reject consider imagine believe expect predict guess
judge compare weigh value treasure cherish
""".split()

ADVERBS = """
slowly quickly quietly carefully often soon again together early late gently softly loudly happily sadly proudly bravely
calmly eagerly gladly kindly neatly nearly suddenly finally usually always sometimes twice once alone clearly plainly
easily partly fully firmly tightly loosely smoothly steadily rapidly swiftly instantly promptly briefly daily weekly
secretly openly honestly politely rudely warmly coldly cheerfully gracefully awkwardly nervously patiently anxiously
curiously silently noisily heavily lightly
""".split()

NAMES = """
Anna Tom Mary John Clara Peter Nora Paul Emma Max Lucy Sam Ruth Ben Alice Jack Eva Leo Ida Hugo Lena Karl Rosa Otto Mira
Finn Ella Noah Lily Adam Vera Ivan Tess Owen Maya Luke Zoe Mark Jane Carl Lisa Erik Hana Omar Nina Joel Iris Theo Olga
Dean Grace Felix Helen Oscar Julia Simon Laura Victor Sarah Henry Martha Walter Agnes Arthur Edith Albert Flora Bruno
Greta Conrad Hilda Edgar Irene Fritz Judith Gavin Karin Harold Linda Igor Monica Jasper Naomi Keith Olive Lionel Paula
Milton Queenie Nathan Rachel Oliver Sylvia Philip Tamara Quentin Ursula Ralph Violet Stefan Wanda Tobias Xenia Ulrich
Yvonne Vernon Zelda Wesley Amelia Xavier Bertha Yusuf Celia Zachary Daphne Amos Esther Basil Frida Cedric Gloria Dexter
Heidi Elias Ingrid Floyd Joanna Gilbert Kirsten Herman Louisa Isaac Mabel Jerome Nadia Kenneth Odette Lars Petra Magnus
Renata Nigel Selma Orson Thelma Percy Ulla Quincy Viola Roland Willa Silas Yara Tristan Astrid Uriah Beatrix Vincent
Cora Wilfred Dorothy Yannick Elsa Anton Fiona Boris Gwen Claude Hazel Dmitri Ilse Emil Jolene Fabian Klara Gustav Lydia
Hector Marta Ismael Nell Jonas Opal Kasper Pearl Lorenz Rhoda Mateo Stella Nils Trudy Oswald Una Pablo Vesta Rafael
Wilma Sergei Zora
""".split()

TOWNS = [  # neighbours in the list differ in their first half
  first + last
  for last in "ford ton bury field wick stead mouth haven dale bridge holm worth combe gate port mere".split()
  for first in (
    "Ash Elm Oak Birch Thorn Hazel Maple Willow Alder Linden Stone Clay Sand Chalk Flint Copper Iron Silver Salt Gold "
    "Red White Black Green Grey North South East West Middle High Low Long Broad Old New King Queen Bishop Abbot "
    "Raven Swan Hawk Crow Fox Wolf Hart Lamb Bull Ram Mill Well Brook Marsh Fern Moss Rye Barley Winter Summer Sun "
    "Moon Star Rain"
  ).split()
]

_JOBS = """
baker farmer teacher doctor sailor painter carpenter tailor miller gardener nurse singer clerk driver printer potter
weaver shepherd blacksmith fisherman librarian watchmaker glazier cooper mason plumber roofer surveyor chemist botanist
geologist astronomer historian translator reporter editor photographer sculptor violinist pianist drummer conductor
juggler acrobat beekeeper brewer butcher grocer florist jeweler cobbler saddler bookbinder locksmith tinker ferryman
postman ranger warden sheriff notary banker broker auctioneer architect engineer electrician welder mechanic pilot
navigator diver
""".split()

_PLACES = """
kitchen garden market harbor library school station church mill barn workshop cellar attic square park forest river
bridge beach museum theatre hospital bakery tavern stable orchard tower castle lighthouse island quarry factory office
courtyard hall cemetery chapel bathhouse greenhouse boathouse warehouse schoolyard playground meadow hillside valley
crossroads railway tollgate monastery observatory laboratory archive gallery stadium campsite shipyard fairground
vineyard sawmill
""".split()

_NARRATIVE = """
{A} {verbed} the {adj} {noun} in the {P}.
{A} went to the {place} with {a_adj} {noun} and came back {adv}.
{A} and {B} {verbed} the {nouns} near the {place}.
In the {P} {A} found {a_adj} {noun} under the {O}.
The {A_job} {verbed} the {O} and then {verbed} {num} {nouns}.
{B} wanted to {verb} the {noun}, but {A} had already {verbed} it.
After {num} minutes {B} {adv} {verbed} the {adj} {O}.
{A} gave {B} the {A_thing} and asked for {a_noun} in return.
Nobody in {A_town} had ever {verbed} such {a_adj} {noun}.
While {A} was {verbing} the {noun}, {B} {verbed} the {nouns} in the {place}.
{B} took the {adj} {noun} from the {place} and put it beside the {O}.
At {hour} o'clock the {adj} {noun} was {adv} {verbed} by {A}.
Then {A} walked to {town}, where {a_noun} and {a_adj} {noun} were waiting.
It was {a_adj} day, and {B} was {verbing} the {O} {adv}.
{A} still had the {A_thing}, but {B} had lost the {B_thing}.
"The {noun} is too {adj}," thought {A}, and {verbed} it again.
On the way from {A_town} to {town} they {verbed} {num} {nouns}.
{B} {verbed} the {noun} because the {nouns} were {adj}.
If the {noun} had not been {adj}, {A} would have {verbed} the {O}.
The {B_job} of {B_town} {verbed} the {A_thing} and {adv} {verbed} the {noun}.
Before {month} {A} had to {verb} the {nouns} of the {job}.
{A} dreamed of {a_adj} {noun} that {verbed} the {nouns} of {town}.
""".strip().splitlines()
_DIALOGUE = """
"Have you seen the {adj} {noun}?" asked {A}.
"It is in the {place}, behind the {noun}," said {B}.
"Who {verbed} the {O}?" asked {B} {adv}.
"I think the {job} {verbed} it at {hour} o'clock," said {A}.
"We must {verb} the {nouns} before {day}," said {A}.
"My {A_thing} is {adj}," said {A}, "and yours is {adj}."
"Why do you {verb} the {noun}?" asked {A}, {verbing} the {O}.
"Because in {B_town} everyone likes to {verb} {nouns}," answered {B}.
"Bring {num} {nouns} and {a_noun}," said {B}, "and do not {verb} the {O}."
"Nobody from {town} would {verb} {a_adj} {noun}," {A} said {adv}.
{A} looked at the {noun} and said nothing about the {adj} {nouns}.
"Let us {verb} it together," said {B}, {verbing} the {adj} {noun}.
""".strip().splitlines()
_DESCRIPTION = """
The {place} of {town} was {adj} and {adj}, with {a_adj} {noun} at the door.
There were {num} {nouns} in it, and each {noun} was {adj}.
{A} lived in {A_town} and was the {A_job} near the {place}.
Beside the {O} stood {a_noun}, {a_noun} and {num} {adj} {nouns}.
The {noun} was {color}, the {noun} was {color}, and the {O} was {adj}.
In {month} the {nouns} of {town} are {adj} and the {noun} is {adj}.
Every {day} the {B_job} {verbed} the {noun} with {a_adj} {noun}.
{B} owned {a_adj} {noun}, {num} {nouns} and the {B_thing}.
Above the {P} there was {a_adj} {noun}, {adj} as {a_noun}.
The {color} {noun} came from {town} and cost {num} coins.
""".strip().splitlines()
_FACTS = """
{sum}.
{A} counted the {nouns}: {sum}.
{A} {share}.
The {noun} of {town} was built in {year} and {verbed} in {year}.
On {month} {date}, {year}, {A} {verbed} the {adj} {noun} of {town}.
The list had {num} {nouns}, {num} {nouns}, {a_adj} {noun} and {num} {adj} {nouns}.
For the {noun} one needs {num} {nouns}, {a_noun}, {a_noun} and {a_adj} {noun}.
From {town} to {town} it is {num} miles, and {num} more to {A_town}.
{B} was born in {B_town} in {year}, and became the {B_job} of {town} {num} years later.
First {verb} the {noun}; second, {verb} the {nouns}; third, {verb} the {adj} {noun}.
The {job} sold {num} {nouns} on {day} and {num} {nouns} on {day}.
""".strip().splitlines()


def _compiled(templates: Sequence[str]) -> list[tuple[str, list[str]]]:
  return [(re.sub(r"{\w+}", "%s", template), re.findall(r"{(\w+)}", template)) for template in templates]


_CLASSES: dict[str, list] = {
  "noun": NOUNS,
  "nouns": [_plural(noun) for noun in NOUNS],
  "a_noun": [_article(noun) for noun in NOUNS],
  "adj": ADJECTIVES,
  "a_adj": [_article(adjective) for adjective in ADJECTIVES],
  "verb": VERBS,
  "verbed": [_past(verb) for verb in VERBS],
  "verbing": [verb.removesuffix("e") + "ing" for verb in VERBS],
  "adv": ADVERBS,
  "town": TOWNS,
  "job": _JOBS,
  "place": _PLACES,
  "thing": [f"{adjective} {noun}" for noun in NOUNS[:200] for adjective in ADJECTIVES[::7]],
  "color": "red blue green white black yellow orange purple pink brown grey crimson scarlet violet turquoise".split(),
  "num": [str(i) for i in range(2, 400)],
  "hour": "nine eight ten seven eleven six five four three two one twelve".split(),
  "day": "Monday Saturday Sunday Friday Tuesday Wednesday Thursday".split(),
  "date": [str(i) for i in range(1, 29)],
  "month": "January February March April May June July August September October November December".split(),
  "year": [str(2024 - i) for i in range(400)],
  "sum": [f"{a} plus {b} is {a + b}" for a in range(2, 100) for b in range(2, 100)]
  + [f"{a} times {b} is {a * b}" for a in range(2, 32) for b in range(2, 32)],
  "share": [f"had {a} coins, gave {b} away and kept {a - b}" for a in range(3, 100) for b in range(1, a)],
}
_FORMS = {  # half of the paragraphs are of the first kind, 1/7 of the last
  "narrative": _compiled(_NARRATIVE),
  "dialogue": _compiled(_DIALOGUE),
  "description": _compiled(_DESCRIPTION),
  "facts": _compiled(_FACTS),
}
