"""The vocabulary of the tiny CLIP: its word lists and the file that open_clip reads.

``python -m tests.vocabularies.clip_vocabulary`` writes ``mmcl/models/tiny_clip/bpe.txt.gz`` again,
the same bytes every time. The file has the form of ``open_clip.tokenizer.SimpleTokenizer``: a
heading line, then one merge per line, gzipped. Ids are 512 bytes (inside a word, then at its end),
the merges, start of text, end of text.
"""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

from mmcl.core import write_atomic
from mmcl.models.open_clip.loading import TINY
from tests.vocabularies.bpe import learn_merges, split_word

FILE = TINY / "bpe.txt.gz"
MERGES = 640
HEADING = "#version: 0.2 mmcl tiny"

# Words of the captions of the glyphs stream, and those that fill the names of emoji: each should
# become one token.
CAPTIONS = """
a an the of in on at and with to is it this that from by for or as are no not photo picture image
drawing scan sketch icon emoji sign symbol print figure view close up digit number letter shape
character handwritten handwriting written printed drawn numeral capital small large tiny big
little bold italic blurry clean noisy low resolution light dark bright pale deep zero one two
three four five six seven eight nine ten circle square triangle star cross ring heart diamond
hexagon pentagon arrow moon crescent ellipse rectangle line dot stripe bar shaped coloured colored
color colour background foreground plain striped dotted checkered solid pattern texture red orange
yellow green blue purple pink brown black white grey gray cyan magenta gold silver upper lower
left right top bottom centre center corner middle side face flag eyes hand smiling skin tone
person man woman button cat arrow
"""

# Words that class names are made of: emoji names, animals, foods, objects, places, people.
NAMES = """
face smiling grinning smile grin eyes eye mouth tongue tears joy laughing crying angry sad happy
winking kissing thinking sleeping sleepy worried surprised tired fearful frowning open closed
raised hand hands finger thumb fist palm waving pointing index folded clapping person people man
woman boy girl child baby family couple old young hair beard blond curly skin tone medium bald
worker teacher doctor farmer cook student singer artist pilot judge police officer guard king
queen prince princess fairy ghost robot alien monster skull clown cat dog mouse rabbit hamster fox
bear panda koala tiger lion cow pig frog monkey chicken bird penguin duck eagle owl bat wolf horse
unicorn zebra deer goat sheep camel elephant giraffe rhinoceros hippopotamus kangaroo gorilla
sloth otter skunk turtle snake lizard dragon whale dolphin fish shark octopus shell crab lobster
shrimp squid snail butterfly bug ant bee beetle spider web scorpion mosquito fly worm dinosaur
crocodile swan peacock parrot turkey flower rose tulip blossom sunflower hibiscus bouquet plant
tree palm cactus leaf leaves herb clover mushroom grapes melon watermelon lemon banana pineapple
apple pear peach cherry cherries strawberry berry blueberry kiwi tomato olive coconut avocado
potato carrot corn pepper cucumber broccoli garlic onion peanut bean chestnut bread croissant
bagel pancake waffle cheese meat bone poultry bacon hamburger fries pizza sandwich taco burrito
egg cooking salad butter salt rice curry noodle noodles spaghetti sushi dumpling soup cake pie
chocolate candy lollipop honey milk coffee tea bottle wine glass beer juice cup bowl fork knife
spoon plate ice cream cookie doughnut popcorn globe world map mountain volcano camping beach
desert island park stadium building house home office hospital bank hotel store school factory
castle tower statue church mosque temple tent city sunset bridge train station bus car taxi truck
tractor bicycle motor scooter road railway fuel wheel light traffic stop anchor boat ship ferry
airplane helicopter rocket satellite luggage clock watch hourglass time half past thirty sun cloud
rain snow lightning tornado fog wind rainbow umbrella fire water wave snowflake snowman drop comet
planet night day morning party balloon gift ribbon ticket medal trophy award ball soccer baseball
basketball football tennis bowling cricket hockey golf skate ski boxing fishing running swimming
climbing dancing game dice chess puzzle card joystick slot machine toy doll art frame thread yarn
glasses shirt jeans scarf gloves coat socks dress kimono shorts purse bag shoe boot sandal crown
hat cap helmet lipstick gem speaker bell music note microphone headphone radio guitar piano
keyboard trumpet violin drum phone telephone battery computer laptop printer camera video
television film projector magnifying candle bulb flash lamp book notebook page scroll newspaper
money dollar euro pound yen coin credit envelope mail email box package mailbox pencil pen brush
crayon folder calendar chart pin clip ruler scissors file lock key hammer axe pick sword bomb
shield tool wrench nut bolt gear scale link chain hook magnet ladder test tube microscope
telescope syringe blood pill bandage door mirror window bed chair couch toilet shower bath soap
sponge broom basket roll paper bucket flag flags of united states kingdom france germany italy
spain japan china india brazil canada russia mexico australia south north korea new zealand
republic islands saint guinea arrow button mark exclamation question check plus minus divide
multiply infinity peace religion zodiac play pause next last track shuffle repeat wireless mobile
mode vibration restroom warning radioactive prohibited entry smoking drinking walking standing
kneeling sitting facing input latin letters body arm leg foot ear nose brain tooth lung heart
broken growing sparkling beating love kiss animal food travel object activity nature drink place
weather vehicle clothing sport
"""

# Common English words and endings, so that free sentences stay short.
COMMON = """
i you he she we they them his her its our their what which who when where why how all each some
any many much more most other another same such very can could will would shall should may might
must have has had do does did be been being was were but if then than so because while about
between into through over under before after above below again once here there out off down only
own just also good bad new old long short high wide near far fast slow hot cold young full empty
clear simple real first second third last early late see look find know think take give make come
go get put use work call ask need feel leave turn start show hear run move live believe hold bring
happen write read sit stand lose pay meet include set learn change lead watch follow begin create
speak open walk win offer remember wait serve build stay fall cut reach kill remain answer thing
way part case point group problem fact year month week hour minute name word side kind head room
story job eye level age street table body field state company system program question government
night area money history result reason research model data task class group example action nation
station mention question making walking taking having looking reading sending better larger
smaller faster longest happiest quickly really nearly education information relation position
condition direction collection section
"""

WEIGHTS = {CAPTIONS: 40, NAMES: 4, COMMON: 2}


def count_words() -> dict[str, int]:
    """Return the weight of each word: caption words count most, then class names."""
    counts: Counter[str] = Counter()
    for text, weight in WEIGHTS.items():
        for word in set(text.split()):
            counts[word] += weight
    return dict(sorted(counts.items()))


def write_vocabulary(path: Path, merges: int = MERGES) -> int:
    """Write a vocabulary file.

    Returns:
        The number of token ids: 512 + ``merges`` + 2.
    """
    words = {split_word(word, "</w>"): weight for word, weight in count_words().items()}
    lines = [HEADING, *(" ".join(pair) for pair in learn_merges(words, merges))]
    # No newline at the end: open_clip would read the empty line as one more merge.
    write_atomic(path, gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
    return 2 * 256 + merges + 2


if __name__ == "__main__":
    write_vocabulary(FILE)
