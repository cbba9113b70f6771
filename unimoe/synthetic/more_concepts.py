"""Several hundred further concepts, so that a detector can learn words and not a list of classes.

Each entry of the tables is an emoji, with a name where Unicode's is not what a person would type
("LOWER LEFT CRAYON"), chosen from contact sheets of three artists (OpenMoji, Twemoji, Noto) that all draw
it. Left out is what is no thing of its own: script, signs, arrows, geometric shapes, flags, keycaps, hours of
the clock, signs of the zodiac, moods of a face, hearts of each colour; and what would be a second drawing of
an earlier name (the face of a cat, a bus from the front).
"""

import unicodedata
import zlib

from .concepts import HELD_OUT, TRAINED, Concept

_TABLE = {
    "animal": "🐀 🐁 🐂 🐃 🐆 🐉 🐊 🐋 🐍 🐏 🐐 🐑 🐓 🐔 🐗 🐚seashell 🐛caterpillar 🐜 🐟 🐠 🐡 🐣 🐦 🐩 "
    "🐪camel 🐹 🐺 🐽 🐾 🐿 🦂 🦃 🦄 🦅 🦇 🦈 🦌 🦍 🦎 🦏 🦐 🦑 🦔 🦕brontosaurus 🦖tyrannosaurus 🦗 🦘 🦙 "
    "🦚 🦛 🦜 🦝 🦞 🦟 🦠 🦡 🦢 🦣 🦤 🦥 🦦 🦧 🦨 🦪 🦫 🦬 🦭 🪰 🪱 🪲 🪳 🕷 🕸 🕊dove 🪶 🪸 🪺bird_nest",
    "food": "🌮 🌯 🌰 🌶chili_pepper 🍇 🍈 🍊 🍏 🍒 🍖 🍗chicken_leg 🍘 🍙 🍚bowl_of_rice 🍛curry "
    "🍜noodle_soup 🍝 🍞 🍟 🍠sweet_potato 🍡 🍢 🍣 🍤 🍥 🍦ice_cream_cone 🍧 🍨 🍫 🍬 🍭 🍮 🍯 "
    "🍰slice_of_cake 🍱 🍲stew 🍳frying_pan 🍴 🍵cup_of_tea 🍶sake_bottle 🍷 🍸 🍹 🍺 🍼 🍽dinner_plate "
    "🍾champagne_bottle 🍿 🎂 🥂champagne_glasses 🥃whiskey_glass 🥄 🥐 🥓 🥔 🥖baguette 🥗salad 🥘paella "
    "🥙pita 🥚 🥛 🥜 🥞 🥟 🥡 🥢 🥣cereal_bowl 🥤soda_cup 🥥 🥧 🥩steak 🥪 🥫tin_can 🥬lettuce 🥭 🥮 🥯 "
    "🧁 🧂 🧃juice_box 🧄 🧅 🧆 🧇 🧈 🧉 🧊 🧋 ☕coffee 🫐 🫑 🫒 🫓 🫔 🫕 🫖 🫘 🫙 🔪kitchen_knife",
    "plant": "🌱 🌲fir_tree 🌳tree 🌸 🌺 🌼daisy 🌾sheaf_of_rice 🌿 🍀 🍁 🍂fallen_leaves 🍃green_leaves "
    "🎄 🎋bamboo 💐 🥀 🪴 🪵log 🪷 ☘ 🏵",
    "vehicle": "🚃 🚄bullet_train 🚇subway 🚈 🚊 🚎 🚐van 🚒 🚓 🚙suv 🚚 🚛lorry 🚝 🚞 🚟 🚠cable_car 🚡 "
    "🚢 🚣 🚤 🛥 🛩propeller_plane 🛰 🛳cruise_ship 🛴kick_scooter 🛵 🛶 🛷 🛸 🛹 🛺 🛻 🛼 🏍motorcycle 🏎 ⛴ "
    "🦼electric_wheelchair 🦽wheelchair 🪂 🚏 🚥traffic_light 🚧barrier 🚨siren ⛽ 🛞 🛟life_buoy",
    "place": "🌋 🎠 🎡 🎢 🎪 🏕campsite 🏖beach 🏗construction_crane 🏙 🏚derelict_house 🏛greek_temple 🏜 🏝 🏞 🏟 "
    "🏠house 🏢 🏤post_office 🏥 🏦 🏨 🏪 🏫 🏬 🏭 🏯 🏰castle 🏔snowy_mountain 💒wedding_chapel ⛪ ⛰ ⛩ ⛲ "
    "⛺ 🕋 🕌 🕍 🛕 🛖 🗻 🗼 🗽 🗿stone_head 🌉bridge 🌅sunrise 🌇sunset 🛣 🛤",
    "sky": "☀sun ☁ ☄ ⛅ ⛈thunderstorm 🌀 🌊ocean_wave 🌍planet_earth 🌑new_moon 🌕full_moon 🌙 🌠 "
    "🌧rain_cloud 🌨snow_cloud 🌩lightning_cloud 🌪tornado ❄ ⚡lightning_bolt ⭐star 🔥 💧 💥explosion "
    "💦splash 🪐saturn ✨ 🎆 🎇sparkler 🫧 🪨",
    "person": "👀 👂 👃 👄 👅 👍 👎 👊fist 👋 👌ok_hand 👏clapping_hands ✋ ✌ ✍ 🤘horns_gesture 🤝 "
    "🤞crossed_fingers 🤳 🙏folded_hands 💪flexed_arm 👉pointing_finger 🦵 🦶 🦷 🧠 🫀 🫁 🦾robot_arm "
    "🦿prosthetic_leg 👣 💀 ☠ 👦 👧 👨 👩 👶 👴old_man 👵old_woman 👮 👷 💂 👸 🤴 👰bride 🤵groom "
    "🎅santa_claus 👻 👹ogre 👺goblin 👽alien 👾space_invader 💃 🧙wizard 🧚 🧛 🧜mermaid 🧝 🧞 🧟 🧌 🦸 "
    "🦹 🥷 🤡 🤠cowboy 🏃 🏄 🏊 🏋 🏌 🏂 ⛷ 🏇jockey 🚴cyclist 🚶 🤸cartwheel 🤹juggler 🤺 🤼 🧗climber "
    "🧘yoga_pose 🕵detective 🧔bearded_man 👳turban 🧕headscarf 👪 👼angel 💩 👤silhouette_of_a_head",
    "object": "👒sun_hat 👓 👔 👕 👖 👗 👘 👙 👚blouse 👛 👜 👝 👞leather_shoe 👟sneaker 👠high_heel "
    "👡sandal 👢boot 🎒backpack 🎓 🎩 🧢cap 🧣 🧤 🧥 🧦 🥻 🥼 🥽 🥾 🥿flat_shoe 🩰 🩱swimsuit 🩲 🩳 "
    "🩴flip-flop 🦺 🥋judo_suit 🎽 ⛑rescue_helmet 🪖 🕶sunglasses 💄 💅 💍 💎diamond 📿 🌂 ⛱beach_umbrella "
    "🎀bow ⚾ 🎾tennis_ball 🏈 🏉rugby_ball 🏏cricket_bat 🏐 🏑field_hockey_stick 🏒ice_hockey_stick "
    "🏓table_tennis_paddle 🏸badminton_racket 🏹 🎱billiard_ball 🎳bowling_pins 🎯dartboard 🎲dice "
    "🎮game_controller 🎰 🕹 🎣fishing_pole 🎿skis ⛸ ⛳golf_hole 🥅 🥇gold_medal 🥈silver_medal "
    "🥉bronze_medal 🎖 🥊 🥌 🥍lacrosse_stick 🥎 🥏frisbee 🤿 🪀 🪁 🪃 🎷 🎹piano 🥁 🪕 🪗 🪘 🎼 🎵 🎤 "
    "🎧headphones 📻 📯 🎙 ♟pawn 🃏joker_card 🀄mahjong_tile 🧩puzzle_piece 🧸 🪆 🪅 🎎 🎏 🎐 🎃pumpkin 🎊 "
    "🎉 🎨palette 🎭theater_masks 🎬 🎞film_strip 🎫 🎥 📽 📹 🪄 🔮 🧿 🪬 🪩 🔨 🪓 🪚saw 🪛 🔧 🔩 ⛏pickaxe "
    "⚙ ⛓ ⚓ ⚔ 🗡dagger 🛡 🔫water_pistol 💣 🧨 🪝 🪜 🧰 🧲 🧱 🪣 🧹 🧺 🧻toilet_paper 🧼soap 🧽 🪥 🪠 🪒 🧴 "
    "🚽 🚿 🛁 🚪 🪟 🪞 🪑 🛋couch 🛏 🛎reception_bell 🔔 🕯 🪔oil_lamp 💡light_bulb 🔦flashlight 🏮lantern 🧯 "
    "🔒 🗝 🧵spool 🧶ball_of_yarn 🪡 🧷 🪢 🔌 🔋 🧭 🗺 ⏱ ⏲timer ⌛ ⌚ 🕰 🌡 ⚖ ⚗ 🧪 🧫 🧬dna 🔬 🔭 "
    "📡satellite_dish 💉 💊 🩹bandage 🩺 🩼 🩻 🩸 🦯white_cane 🛗 🚬cigarette 🪤 🛒shopping_cart 🛍 "
    "🧳suitcase 🏺 ⚰ ⚱ 🪦gravestone 🗑trash_can 🪧 🛢 💈 🔱trident 🧮 🪙 💰 💳 💵banknote 🧾 💻laptop 🖥 🖨 ⌨ "
    "🖱computer_mouse 🖲 💽 💾 💿compact_disc 📱 ☎telephone 📞 📟 📠 📺 📼 🎛 🎚 🔍magnifying_glass 📓 "
    "📕closed_book 📖 📚stack_of_books 📜 📝 📰 🔖 🏷 📁folder 📅 📇 📈line_chart 📊 📋 📌 📍map_pin 📎 "
    "📏ruler 📐set_square 🗃 🗄 📦cardboard_box 📫mailbox 📮 ✉ 💌 📣megaphone 📢loudspeaker 🔈 ✏ "
    "✒fountain_pen_nib 🖊ballpoint_pen 🖌paintbrush 🖍crayon 💼 📛 🗳 🖼picture_frame 💺 🪪 🗒 ❤heart 💔 🏁 "
    "🧧red_envelope 🛝 🕳",
}


def short_name(char: str) -> str:
    """Unicode's name of an emoji as a person would type it: "wolf" for WOLF FACE, "camera" for CAMERA WITH
    FLASH."""
    name = unicodedata.name(char).lower().split(" with ")[0]
    return " ".join(word for word in name.split() if word not in ("face", "symbol", "sign"))


def _words(name: str) -> set[str]:
    return set(name.replace("-", " ").split()) - {"of", "and", "a"}


def _split() -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """(trained, held out): every eighth, by a hash of the name, is held out, if no other name shares a word
    with it. A name that shares a word with HELD_OUT is in neither."""
    known = TRAINED + HELD_OUT
    taken = {word for concept in HELD_OUT for word in _words(concept.name)}
    found = [
        Concept(entry[0], entry[1:].replace("_", " ") or short_name(entry[0]), group)
        for group, line in _TABLE.items()
        for entry in line.split()
    ]
    found = [concept for concept in found if not _words(concept.name) & taken]
    uses = [word for concept in (*known, *found) for word in _words(concept.name)]
    trained, held_out = [], []
    for concept in found:
        unique = all(uses.count(word) == 1 for word in _words(concept.name))
        chosen = unique and zlib.crc32(concept.name.encode()) % 8 == 0
        (held_out if chosen else trained).append(concept)
    return tuple(trained), tuple(held_out)


MORE_TRAINED, MORE_HELD_OUT = _split()
"""The 657 concepts that training images show beside TRAINED, and the 46 that only held-out tests show beside
HELD_OUT."""
