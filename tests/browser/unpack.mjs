// Unpacks Chromium, its libraries and a font into the folder that TMPDIR names.
import { inflate } from "@sparticuz/chromium";

const archives = ["fonts.tar.br", "al2023.tar.br", "chromium.br"];
for (const name of archives) await inflate(`node_modules/@sparticuz/chromium/bin/${name}`);
