"""Words that ordinary prompts are made of, by the name of the place they take in a template."""

from __future__ import annotations


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


WORDS: dict[str, tuple[str, ...]] = {
    "animal": _list(
        "dog, horse, cow, sheep, goat, pig, rabbit, fox, wolf, bear, lion, tiger, elephant,"
        "giraffe, zebra, monkey, kangaroo, whale, dolphin, shark, octopus, crab, ant, butterfly,"
        "bee, frog, snake, turtle, crocodile, eagle, owl, penguin, parrot, chicken, duck, swan,"
        "hamster, squirrel, beaver, camel, bat, snail, lobster, salmon, cheetah, gorilla"
    ),
    "food": _list(
        "pizza, soup, salad, pancakes, rice, pasta, an omelette, tomato sauce, apple pie, coffee,"
        "tea, mashed potatoes, lentil stew, porridge, chocolate cake, cookies, a sandwich, curry,"
        "vegetable stock, lemonade, a smoothie, roast chicken, hummus, guacamole, yoghurt, cheese,"
        "butter, jam, muffins, noodles, risotto, a fruit salad, garlic bread, scrambled eggs"
    ),
    "fruit": _list(
        "apple, banana, cherry, grape, lemon, mango, orange, peach, pear, plum, strawberry, melon,"
        "potato, carrot, cucumber, pumpkin, onion, pepper, avocado, olive, bean, mushroom, pea"
    ),
    "object": _list(
        "chair, table, lamp, clock, mirror, umbrella, key, door, window, bicycle, car, train, ship,"
        "kite, drum, guitar, piano, violin, camera, telephone, computer, pencil, book, letter,"
        "candle, bottle, cup, spoon, knife, hammer, ladder, rope, basket, blanket, coat, shoe, hat,"
        "ring, coin, map, compass, telescope, bridge, tower, lighthouse, garden, bench, mailbox"
    ),
    "theme": _list(
        "the moon, rain, winter, spring, summer, friendship, the night sky, a mountain, a river,"
        "an old tree, the wind, home, hope, time, a lost key, the first snow, a garden, a storm,"
        "the desert, a train at night, a lighthouse, morning coffee, a sleeping dog, silence,"
        "music, memory, a bridge, the stars, a small town, a market, courage, dreams, bread, fog"
    ),
    "job": _list(
        "teacher, nurse, farmer, baker, pilot, lawyer, engineer, plumber, chef, librarian, judge,"
        "carpenter, electrician, firefighter, scientist, journalist, architect, dentist, musician,"
        "gardener, tailor, photographer, translator, accountant, astronomer, veterinarian, sailor"
    ),
    "place": _list(
        "a museum, a library, a park, the mountains, a lake, a farm, a big city, a desert, a zoo,"
        "an airport, a train station, a theatre, a supermarket, a forest, a castle, a hospital,"
        "a school, a bakery, a harbour, a campsite, a restaurant, an island"
    ),
    "activity": _list(
        "learning to cook, running, swimming, painting, reading, gardening, playing chess, cycling,"
        "learning a language, saving money, making friends, studying, writing a diary, meditating,"
        "public speaking, dancing, hiking, taking photographs, knitting, playing the guitar,"
        "waking up early, working from home, planning a trip, cleaning the house, moving house"
    ),
    "science": _list(
        "evolution, electricity, magnetism, friction, an atom, a molecule, a cell, DNA, a virus,"
        "bacteria, energy, an ecosystem, erosion, evaporation, condensation, the water cycle,"
        "a volcano, an earthquake, a tornado, a black hole, a comet, a galaxy, an eclipse, light,"
        "sound, heat, pressure, density, inertia, osmosis, a vaccine, a fossil, climate, a tide,"
        "the greenhouse effect, a hormone, a protein, the immune system, the food chain, mass"
    ),
    "mathematics": _list(
        "a triangle, a fraction, a percentage, an average, a median, an angle, a circle, a square,"
        "an even number, an odd number, a factor, a multiple, the number pi, probability, a ratio,"
        "a polygon, an equation, a variable, a function, a matrix, a vector, a decimal, symmetry"
    ),
    "society": _list(
        "democracy, a constitution, inflation, a tax, a bank, insurance, a law, a vote, trade,"
        "supply and demand, a budget, a parliament, human rights, a market, a contract, a loan,"
        "philosophy, logic, ethics, a metaphor, a novel, a myth, a simile, poetry, opera, jazz"
    ),
    "grammar": _list(
        "a verb, an adjective, an adverb, a pronoun, a preposition, a conjunction, a sentence,"
        "a vowel, a consonant, a syllable, a prefix, a suffix, a plural, a comma, an article"
    ),
    "computing": _list(
        "an algorithm, a computer, the internet, a browser, an operating system, a database,"
        "a compiler, memory, a file, a network, an email, a password, a loop, a list, recursion,"
        "a variable, a bug, open source software, machine learning, encryption, a robot, a server"
    ),
    "element": _list(
        "hydrogen, helium, carbon, nitrogen, oxygen, sodium, aluminium, silicon, sulphur, chlorine,"
        "potassium, calcium, iron, copper, zinc, silver, tin, gold, mercury, lead, uranium, neon"
    ),
    "planet": _list("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"),
    "city": _list(
        "Rome, Madrid, Berlin, London, Vienna, Prague, Athens, Cairo, Nairobi, Lagos, Delhi,"
        "Beijing, Shanghai, Seoul, Sydney, Toronto, New York, Chicago, Mexico City, Lima, Bogota,"
        "Istanbul, Moscow, Stockholm, Lisbon, Dublin, Warsaw, Budapest, Bangkok, Jakarta, Paris"
    ),
    "book": _list(
        "Hamlet, Pride and Prejudice, Moby Dick, Don Quixote, War and Peace, The Odyssey, Dracula,"
        "Oliver Twist, Jane Eyre, Frankenstein, Treasure Island, Alice in Wonderland, Macbeth,"
        "The Hobbit, Les Miserables, Robinson Crusoe, The Divine Comedy, 1984, Faust, Peter Pan"
    ),
    "invention": _list(
        "the telephone, the light bulb, the steam engine, the printing press, the aeroplane,"
        "the radio, the telescope, dynamite, the bicycle, the World Wide Web, the microscope,"
        "the piano, penicillin, the battery, the camera, the car, the thermometer"
    ),
    "person": _list(
        "Marie Curie, Isaac Newton, Charles Darwin, Galileo Galilei, Nikola Tesla, Ada Lovelace,"
        "Aristotle, Plato, Cleopatra, Julius Caesar, Napoleon, Mahatma Gandhi, Nelson Mandela,"
        "Mozart, Beethoven, Bach, Vincent van Gogh, Pablo Picasso, Frida Kahlo, Jane Austen,"
        "Charles Dickens, Mark Twain, Homer, Florence Nightingale, Amelia Earhart, Alan Turing,"
        "Abraham Lincoln, Queen Victoria, Marco Polo, Christopher Columbus, Louis Pasteur"
    ),
    "event": _list(
        "the First World War, the Second World War, the French Revolution, the moon landing,"
        "the fall of the Berlin Wall, the American Civil War, the Renaissance, the Black Death,"
        "the Industrial Revolution, the first Olympic Games, the sinking of the Titanic"
    ),
    "word": _list(
        "sad, big, small, fast, slow, strong, weak, bright, dark, old, new, young, rich, poor,"
        "hard, hot, warm, dry, wet, clean, dirty, full, empty, loud, quiet, brave, kind, angry,"
        "beautiful, clever, important, heavy, light, early, late, high, low, near, far, begin, end,"
        "love, win, buy, give, push, open, remember, laugh, build, arrive, help, run, speak, think"
    ),
    "phrase": _list(
        "good evening, thank you, see you tomorrow, please, water, house, friend, I am hungry,"
        "how much is it, where is the station, my name is Anna, the book, good luck, yes, no,"
        "happy birthday, I love music, one coffee please, excuse me, the red car, welcome, cat,"
        "dog, bread, school, mother, brother, the sun, it is raining, I do not understand"
    ),
    "language": _list("Spanish, French, German, Italian, Portuguese, Latin, Dutch"),
    "idiom": _list(
        "A stitch in time saves, When in Rome do as the, Better late than, Practice makes,"
        "Actions speak louder than, Two heads are better than, Where there is smoke there is,"
        "The apple does not fall far from the, Do not judge a book by its, Every cloud has a,"
        "All that glitters is not, You can lead a horse to, A picture is worth a thousand,"
        "Birds of a feather flock, Look before you, Rome was not built in a, Time is,"
        "Roses are red and violets are, The capital of Italy is, The sun rises in the,"
        "Once upon a time there was a, On Monday I went to the, My favourite season is,"
        "Ice is made of, A group of wolves is called a, The opposite of love is"
    ),
    "wrong": _list(
        "She do not like apples., They was late yesterday., I has two brothers., He don't know.,"
        "We goes to the park every day., The childs are playing., Me and him is friends.,"
        "I seen that movie last week., Their going to the shop., Its a nice day today.,"
        "She sing very good., There is many people here., I am agree with you., He runned home.,"
        "Yesterday I eat a apple., The dog wagged it's tail., Can you borrow me a pen?,"
        "I didn't went to school., This are my books., She is more taller than me."
    ),
    "present": _list(
        "I walk the dog., They play football., We eat dinner at seven., The bird sings.,"
        "He writes a letter., The children run home., I see a ship., My sister reads a book.,"
        "The train leaves at noon., You speak too fast., The cook makes soup., Rain falls.,"
        "She opens the window., The boy finds a coin., We swim in the lake."
    ),
    "code": _list(
        "reverses a string, finds the largest number in a list, counts the vowels in a string,"
        "checks whether a number is even, computes a factorial, returns the sum of a list,"
        "removes duplicates from a list, checks whether a word is a palindrome, sorts a list,"
        "converts Celsius to Fahrenheit, multiplies two numbers, prints the numbers from 1 to 10,"
        "reads a file line by line, merges two dictionaries, computes the average of a list,"
        "returns the nth Fibonacci number, counts words in a text, finds the shortest string,"
        "checks whether a year is a leap year, computes the area of a circle, rolls a die,"
        "squares every number of a list, joins a list of words with spaces, says hello"
    ),
    "skill": _list(
        "tie a tie, change a tyre, plant a tree, wash a wool sweater, iron a shirt, make tea,"
        "write a letter, read a map, clean a window, fold a paper plane, sharpen a pencil,"
        "remove a stain, paint a wall, train a puppy, grow tomatoes, sew on a button, make a bed,"
        "back up a computer, choose a good password, take a good photograph, hang a picture,"
        "cook rice, peel an orange, wrap a present, start a campfire, learn to juggle, swim"
    ),
    "problem": _list(
        "I can't concentrate, I am always late, I feel nervous before exams, I argue with my"
        " brother, my plants keep dying, I forget names, I want to eat healthier, I am bored,"
        "my room is too hot, I spend too much money, my neighbour is noisy, I miss my family,"
        "I have a job interview tomorrow, I want to exercise more, my dog barks all night,"
        "I have too much homework, I can't decide what to study, I feel tired in the afternoon"
    ),
    "request": _list(
        "asking a teacher for more time, thanking a friend for a gift, inviting a neighbour to"
        " dinner, complaining about a late parcel, cancelling a hotel booking, asking for a refund,"
        "congratulating a colleague, apologising for being late, asking a landlord for a repair,"
        "applying for a summer job, asking for directions, recommending a book, saying goodbye to"
        " colleagues, asking for a meeting next week, introducing yourself to a new team"
    ),
    "superlative": _list(
        "tallest mountain, longest river, biggest ocean, smallest country, largest country,"
        "deepest lake, hottest desert, largest island, biggest animal, tallest animal, oldest city,"
        "largest bird, most spoken language, hardest material, coldest place, fastest bird"
    ),
    "measure": _list(
        "hours are in a day, minutes are in an hour, seconds are in a minute, months are in a year,"
        "days are in a year, weeks are in a year, days are in January, years are in a century,"
        "years are in a decade, letters are in the English alphabet, sides does a triangle have,"
        "sides does a hexagon have, corners does a cube have, strings does a violin have, players"
        " are on a football team, planets are in the solar system, oceans are there, wheels does a"
        " bicycle have, fingers do people have, colours are in a rainbow, seasons are in a year,"
        "legs does an ant have, legs does a chicken have, arms does an octopus have, cards are in"
        " a deck, keys does a piano have, grams are in a kilogram, eggs are in a dozen"
    ),
    "unit": _list(
        "kilometres to miles, miles to kilometres, metres to centimetres, hours to minutes, minutes"
        " to seconds, kilograms to grams, pounds to kilograms, inches to centimetres,"
        "litres to millilitres, feet to inches, weeks to days, degrees Celsius to Fahrenheit,"
        "centimetres to millimetres, grams to milligrams, years to months, tons to kilograms"
    ),
    "question": _list(
        "do leaves change colour, is the ocean salty, do we dream, do cats purr, does ice float,"
        "is the grass green, do birds migrate, do onions make us cry, is exercise good for you,"
        "do we have seasons, does the moon change shape, is sleep important, do people yawn,"
        "do stars twinkle, does bread rise, do magnets attract iron, is reading useful,"
        "do we need water, do some animals hibernate, is honesty important, do metals rust"
    ),
    "material": _list(
        "glass, paper, steel, chocolate, cheese, soap, wine, concrete, plastic, silk, wool, ink,"
        "rubber, sugar, salt, flour, honey, leather, cotton, bricks, beer, vinegar"
    ),
    "pair": _list(
        "cats and dogs, tea and coffee, trains and planes, books and films, the city and the"
        " countryside, summer and winter, a lake and a sea, a crocodile and an alligator, cash and"
        " cards, a violin and a cello, frogs and toads, weather and climate, a comet and an"
        " asteroid, email and letters, jam and jelly, Python and Java, a moth and a butterfly,"
        "running and walking, a novel and a short story, mass and weight, speed and velocity"
    ),
    "role": _list(
        "You are a helpful assistant., You are a friendly teacher., Answer briefly.,"
        "You are a careful assistant who explains things simply., You are a travel guide.,"
        "Answer in one or two sentences., You are an assistant for children.,"
        "You are an experienced programmer., Be polite and concise."
    ),
}
