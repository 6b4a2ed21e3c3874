"""Captions of one or two things in ten languages: "an owl left of a turtle", "eine Eule links von einer Schildkröte".

Only forms that are right for every pair of these things: an indefinite article and its case where a language has them,
a noun phrase where a sentence would need another verb for what is alive ("カメの左のフクロウ").
"""

from collections.abc import Sequence
from typing import NamedTuple

# A row a thing. Before a noun is the key of its article; after a slash is its form behind the relation, if another one.
NOUNS = """
en           | de                   | fr                 | es               | it
an apple     | m Apfel              | f pomme            | f manzana        | f mela
a banana     | f Banane             | f banane           | m plátano        | f banana
a cactus     | m Kaktus             | m cactus           | m cactus         | m cactus
a tree       | m Baum               | m arbre            | m árbol          | m albero
a mushroom   | m Pilz               | m champignon       | m champiñón      | m fungo
a strawberry | f Erdbeere           | f fraise           | f fresa          | f fragola
a cake       | f Torte              | m gâteau           | f tarta          | f torta
a pizza      | f Pizza              | f pizza            | f pizza          | f pizza
a frog       | m Frosch             | f grenouille       | f rana           | f rana
a cat        | f Katze              | m chat             | m gato           | m gatto
a pig        | n Schwein            | m cochon           | m cerdo          | m maiale
a panda      | m Panda              | m panda            | m panda          | m panda
an elephant  | m Elefant/Elefanten  | m éléphant         | m elefante       | m elefante
a turtle     | f Schildkröte        | f tortue           | f tortuga        | f tartaruga
an octopus   | m Oktopus            | f pieuvre          | m pulpo          | m polpo
a fish       | m Fisch              | m poisson          | m pez            | m pesce
a butterfly  | m Schmetterling      | m papillon         | f mariposa       | f farfalla
an owl       | f Eule               | m hibou            | m búho           | m gufo
a penguin    | m Pinguin            | m manchot          | m pingüino       | m pinguino
a football   | m Fußball            | m ballon de foot   | m balón          | m pallone
a book       | n Buch               | m livre            | m libro          | m libro
a star       | m Stern              | f étoile           | f estrella       | f stella
a heart      | n Herz/Herzen        | m cœur             | m corazón        | m cuore
a gift       | n Geschenk           | m cadeau           | m regalo         | m regalo
a crown      | f Krone              | f couronne         | f corona         | f corona
a guitar     | f Gitarre            | f guitare          | f guitarra       | f chitarra
a balloon    | m Luftballon         | m ballon           | m globo          | m palloncino
a bus        | m Bus                | m bus              | m autobús        | m autobus
a rocket     | f Rakete             | f fusée            | m cohete         | m razzo
a boat       | n Boot               | m bateau           | m barco          | f barca
a house      | n Haus               | f maison           | f casa           | f casa
a robot      | m Roboter            | m robot            | m robot          | m robot
"""
MORE_NOUNS = """
en           | pt                   | id                 | zh     | ja               | ko
an apple     | f maçã               | apel               | 苹果   | りんご           | 사과
a banana     | f banana             | pisang             | 香蕉   | バナナ           | 바나나
a cactus     | m cacto              | kaktus             | 仙人掌 | サボテン         | 선인장
a tree       | f árvore             | pohon              | 树     | 木               | 나무
a mushroom   | m cogumelo           | jamur              | 蘑菇   | きのこ           | 버섯
a strawberry | m morango            | stroberi           | 草莓   | いちご           | 딸기
a cake       | m bolo               | kue                | 蛋糕   | ケーキ           | 케이크
a pizza      | f pizza              | piza               | 披萨   | ピザ             | 피자
a frog       | m sapo               | katak              | 青蛙   | カエル           | 개구리
a cat        | m gato               | kucing             | 猫     | 猫               | 고양이
a pig        | m porco              | babi               | 猪     | ブタ             | 돼지
a panda      | m panda              | panda              | 熊猫   | パンダ           | 판다
an elephant  | m elefante           | gajah              | 大象   | ゾウ             | 코끼리
a turtle     | f tartaruga          | kura-kura          | 乌龟   | カメ             | 거북이
an octopus   | m polvo              | gurita             | 章鱼   | タコ             | 문어
a fish       | m peixe              | ikan               | 鱼     | 魚               | 물고기
a butterfly  | f borboleta          | kupu-kupu          | 蝴蝶   | チョウ           | 나비
an owl       | f coruja             | burung hantu       | 猫头鹰 | フクロウ         | 부엉이
a penguin    | m pinguim            | penguin            | 企鹅   | ペンギン         | 펭귄
a football   | f bola de futebol    | bola               | 足球   | サッカーボール   | 축구공
a book       | m livro              | buku               | 书     | 本               | 책
a star       | f estrela            | bintang            | 星星   | 星               | 별
a heart      | m coração            | hati               | 爱心   | ハート           | 하트
a gift       | m presente           | kado               | 礼物   | プレゼント       | 선물
a crown      | f coroa              | mahkota            | 皇冠   | 王冠             | 왕관
a guitar     | f guitarra           | gitar              | 吉他   | ギター           | 기타
a balloon    | m balão              | balon              | 气球   | 風船             | 풍선
a bus        | m ônibus             | bus                | 公交车 | バス             | 버스
a rocket     | m foguete            | roket              | 火箭   | ロケット         | 로켓
a boat       | m barco              | perahu             | 船     | ボート           | 보트
a house      | f casa               | rumah              | 房子   | 家               | 집
a robot      | m robô               | robot              | 机器人 | ロボット         | 로봇
"""
# Key → the article before the first thing, and before the second.
ARTICLES = {
    "en": {"a": ("a ", "a "), "an": ("an ", "an ")},
    "de": {"m": ("ein ", "einem "), "f": ("eine ", "einer "), "n": ("ein ", "einem ")},
    "fr": {"m": ("un ", "d'un "), "f": ("une ", "d'une ")},
    "es": {"m": ("un ", "un "), "f": ("una ", "una ")},
    "it": {"m": ("un ", "un "), "f": ("una ", "una ")},
    "pt": {"m": ("um ", "um "), "f": ("uma ", "uma ")},
}
# "left of", "above".
RELATIONS = {
    "en": ("left of", "above"),
    "de": ("links von", "über"),
    "fr": ("à gauche", "au-dessus"),
    "es": ("a la izquierda de", "encima de"),
    "it": ("a sinistra di", "sopra"),
    "pt": ("à esquerda de", "acima de"),
    "id": ("di sebelah kiri", "di atas"),
    "zh": ("左边", "上方"),
    "ja": ("左", "上"),
    "ko": ("왼쪽의", "위의"),
}
PATTERNS = {
    "zh": "{second}{relation}的{first}",
    "ja": "{second}の{relation}の{first}",
    "ko": "{second} {relation} {first}",
}
UNSPACED = ("zh", "ja")  # their nouns cannot be told apart as words


class Noun(NamedTuple):
    """The form of a noun as the first of two things, or alone, and as the second one; each with its article."""

    forms: tuple[str, str]
    with_article: tuple[str, str]


class Caption(NamedTuple):
    """A caption, and the words in it that evaluation looks for: `nouns`, `relations`."""

    text: str
    parts: dict[str, list[str]]


def _table() -> dict[str, dict[str, Noun]]:
    """Returns language → English noun → noun."""
    found: dict[str, dict[str, Noun]] = {}
    for text in (NOUNS, MORE_NOUNS):
        head, *rows = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
        for row in rows:
            thing = row[0].partition(" ")[2]
            for language, cell in zip(head, row, strict=True):
                found.setdefault(language, {})[thing] = _noun(cell, ARTICLES.get(language))
    return found


def _noun(cell: str, articles: dict[str, tuple[str, str]] | None) -> Noun:
    key, noun = cell.split(" ", 1) if articles else ("", cell)
    first, second = articles[key] if articles else ("", "")
    form, _, declined = noun.partition("/")
    forms = (form, declined or form)
    return Noun(forms, (first + forms[0], second + forms[1]))


TABLE = _table()


def compose_caption(language: str, things: Sequence[str], relation: str) -> Caption:
    """Returns the caption of one or two things and the relation of the first to the second, all named in English.

    Raises:
        KeyError: the language is none of RELATIONS, or a thing none of the table.
    """
    nouns = [TABLE[language][thing] for thing in things]
    phrases = [RELATIONS[language][RELATIONS["en"].index(relation)]] if relation else []
    first, second = nouns[0].with_article[0], nouns[-1].with_article[1]
    pattern = PATTERNS.get(language, "{first} {relation} {second}")
    text = pattern.format(first=first, relation=phrases[0], second=second) if phrases else first
    parts = {"nouns": [noun.forms[place] for place, noun in enumerate(nouns)], "relations": phrases}
    return Caption(text, {} if language in UNSPACED else parts)


def listed(names: list[str]) -> Caption:
    """Returns the caption of a language without a grammar here: the names of the things alone."""
    return Caption(", ".join(names), {"nouns": names})
